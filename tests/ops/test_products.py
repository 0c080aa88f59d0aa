"""Products by oneDNN where that is faster, and PyTorch's own elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fambav.models
from fambav.ops import composed, products
from fambav.ops.scratch import LARGEST, scratch

DIM, OUT, TOKENS = 128, 256, 70


@pytest.fixture(params=["onednn", "plain"])
def kernel(request, monkeypatch):
    """Choose as a processor of AMD with AVX-512 does, or as any other."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN")
    processor = {"cpu_name": "AMD" if request.param == "onednn" else "Intel", "avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    products._onednn.cache_clear()
    yield request.param
    products._onednn.cache_clear()


def tensors(batch=3, tokens=TOKENS, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, DIM, generator=draw, dtype=dtype)
    return x, torch.randn(OUT, DIM, generator=draw, dtype=dtype)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of `mkldnn.flags` itself
def test_it_is_torchs_own_where_no_processor_is_known_to_gain(kernel):
    x, weight = tensors()
    own = products.choose(x, weight) is F.linear
    assert own == (kernel == "plain" or not torch.backends.mkl.is_available())
    assert products.choose(x, weight[: OUT // 16]) is F.linear
    assert products.choose(x[:, :60], weight) is F.linear
    assert products.choose(x.double(), weight.double()) is F.linear
    assert products.choose(x.to("meta"), weight.to("meta")) is F.linear
    with torch.backends.mkldnn.flags(enabled=False):
        assert products.choose(x, weight) is F.linear


def test_a_batch_of_any_size_is_multiplied_in_the_same_way(kernel):
    del kernel
    x, weight = tensors(batch=64)
    for batch in (1, 2, 64):
        assert products.choose(x[:batch], weight) is products.choose(x, weight)


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_product_and_gradients_are_torchs(kernel, tokens):
    del kernel
    found = []
    for function, dtype in ((products.linear, torch.float32), (F.linear, torch.float64)):
        x, weight = (t.to(dtype).requires_grad_() for t in tensors(tokens=tokens))
        y = function(x, weight)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    for got, exact in zip(*found, strict=True):
        assert (got - exact).norm() < 1e-6 * exact.norm()


def test_second_derivatives_and_transforms_are_torchs(kernel):
    del kernel
    x, weight = (t.requires_grad_() for t in tensors(batch=1))
    grads = []
    for function in (products.linear, F.linear):
        (grad,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-2)
    each = torch.func.vmap(products.linear, in_dims=(0, None))(x, weight)
    torch.testing.assert_close(each, F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_autocast_and_the_flop_counter_see_the_product(kernel):
    del kernel
    x, weight = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    assert fambav.models  # registers what the counter knows
    x.requires_grad_()
    weight.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        products.linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * OUT


def test_an_exported_product_is_torchs(kernel):
    del kernel

    class Net(torch.nn.Module):
        def forward(self, x, weight):
            return products.linear(x, weight)

    with composed():
        exported = torch.export.export(Net(), tensors())
    assert "mkldnn" not in str(exported.graph)


def test_a_buffer_is_used_again_by_its_name_dtype_and_thread():
    like = torch.zeros(1)
    first = scratch("a", (3, 4), like)
    assert scratch("a", (2, 5), like).data_ptr() == first.data_ptr()
    assert scratch("b", (3, 4), like).data_ptr() != first.data_ptr()
    assert scratch("a", (3, 4), like.double()).dtype == torch.float64
    with torch.inference_mode():
        assert not scratch("c", (3,), like).is_inference()
    large = LARGEST // like.itemsize + 1
    kept = scratch("a", (3, 4), like).data_ptr()
    assert scratch("a", (large,), like).data_ptr() != kept
    assert scratch("a", (3, 4), like.to("meta")).is_meta
