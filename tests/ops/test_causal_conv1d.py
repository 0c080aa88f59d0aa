"""The causal convolution: its definition, its backends, and how the package is called."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fambav.ops import BackendError, causal_conv1d, force, kernels
from fambav.ops.causal_conv1d import CAUSAL_CONV1D
from fambav.ops.dispatch import no_reason
from tests.ops.agreement import agree, draw, results, widened

OP = "causal_conv1d"
BACKENDS = ["cpu", "reference"]


def inputs(batch=2, dim=8, length=5, width=4, *, dtype=torch.float32, device="cpu"):
    """Channels last in memory, and parameters in float32 as in a model."""
    wide = torch.promote_types(dtype, torch.float32)
    x = draw("x", batch, length, dim, dtype=dtype, device=device)
    return dict(
        x=x.mT.detach().requires_grad_(),
        weight=draw("weight", dim, width, dtype=wide, device=device),
        bias=draw("bias", dim, dtype=wide, device=device),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_sees_itself_and_those_before(backend):
    x = torch.tensor([[[1.0, 10.0, 100.0, 1000.0, 10000.0]]])
    weight, bias = torch.tensor([[4.0, 3.0, 2.0]]), torch.tensor([0.5])
    with force(backend, OP):
        y = causal_conv1d(x, weight, bias)
        backward = causal_conv1d(x, weight, bias, reverse=True)
    assert y[0, 0].tolist() == [2.5, 23.5, 234.5, 2340.5, 23400.5]
    assert backward[0, 0].tolist() == [432.5, 4320.5, 43200.5, 32000.5, 20000.5]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 5, 65])
@pytest.mark.parametrize(("dim", "width"), [(8, 4), (87, 3), (6, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_float64_reference(
    backend, dim, width, length, dtype, reverse, activation
):
    tensors = inputs(3, dim, length, width, dtype=dtype)
    options = dict(op=OP, reverse=reverse, activation=activation)
    got = results(causal_conv1d, tensors, backend, **options)
    assert got["output 0"].dtype == dtype
    agree(got, results(causal_conv1d, widened(tensors), "reference", **options), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "length"), [(8, 5), (87, 65), (384, 197)])
@pytest.mark.parametrize(
    "backend", [pytest.param("cuda", marks=pytest.mark.gpu("causal_conv1d")), *BACKENDS]
)
def test_backends_on_a_gpu_agree_with_the_float64_reference(backend, dim, length, dtype, reverse):
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = False
    tensors = inputs(3, dim, length, dtype=dtype, device="cuda")
    options = dict(op=OP, reverse=reverse, activation="silu")
    want = results(causal_conv1d, widened(tensors), "reference", **options)
    agree(results(causal_conv1d, tensors, backend, **options), want, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_is_flip_convolve_flip(backend):
    tensors = inputs(dtype=torch.float64)
    with force(backend, OP):
        y = causal_conv1d(**tensors, activation="swish", reverse=True)
        flipped = causal_conv1d(**tensors | dict(x=tensors["x"].flip(2)), activation="silu")
    torch.testing.assert_close(y, flipped.flip(2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_padded_convolution_with_a_group_for_each_channel(backend):
    tensors = inputs(length=9)
    with force(backend, OP):
        y = causal_conv1d(**tensors)
    kernel = tensors["weight"][:, None]
    want = F.conv1d(tensors["x"], kernel, tensors["bias"], padding=3, groups=8)[..., :9]
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_can_be_left_out(backend):
    tensors = {name: x for name, x in inputs(dtype=torch.float64).items() if name != "bias"}
    got = results(causal_conv1d, tensors, backend, OP, activation="silu")
    zero = torch.zeros(8, dtype=torch.float64)
    want = causal_conv1d(**tensors, bias=zero, activation="silu")
    torch.testing.assert_close(got["output 0"], want.detach())
    assert got["gradient of weight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_function(backend):
    tensors = inputs(dim=3, dtype=torch.float64)

    def call(*arguments):
        return causal_conv1d(*arguments, activation="silu", reverse=True)

    with force(backend, OP):
        assert torch.autograd.gradcheck(call, tuple(tensors.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    want = results(causal_conv1d, inputs(), backend, OP, activation="silu")
    with torch.autocast("cpu", torch.bfloat16):
        got = results(causal_conv1d, inputs(), backend, OP, activation="silu")
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_strides_of_x(backend):
    tensors = inputs()
    half = draw("half", 2, 5, 16)[..., :8].mT
    with force(backend, OP):
        assert causal_conv1d(**tensors).stride() == (40, 1, 8)
        assert causal_conv1d(**tensors | dict(x=half)).stride() == (40, 1, 8)
        assert causal_conv1d(**tensors | dict(x=half.contiguous())).stride() == (40, 5, 1)


def test_the_cpu_backend_keeps_its_inputs_and_no_more():
    tensors, kept = inputs(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks, force("cpu", OP):
        causal_conv1d(**tensors, activation="silu")
    own = {x.untyped_storage().data_ptr() for x in tensors.values()}
    assert {x.untyped_storage().data_ptr() for x in kept} == own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(8, 5), torch.ones(8, 4)), r"x has shape \(8, 5\), expected \(batch, dim"),
        ((torch.ones(2, 8, 0), torch.ones(8, 4)), r"x has shape \(2, 8, 0\), expected"),
        (
            (torch.ones(2, 8, 5), torch.ones(4)),
            r"weight has shape \(4,\), expected \(dim, width >= 1\)",
        ),
        ((torch.ones(2, 8, 5), torch.ones(8, 4).long()), "weight is torch.int64, expected a floa"),
        ((torch.ones(2, 8, 5), torch.ones(8, 4, device="meta")), "weight is on meta, expected cpu"),
        ((torch.ones(2, 8, 5), torch.ones(7, 4)), r"weight has shape \(7, 4\), expected \(8, 4\)"),
        ((torch.ones(2, 8, 5), torch.ones(8, 4), torch.ones(4)), r"bias has shape \(4,\)"),
        ((torch.ones(2, 8, 5), torch.ones(8, 4), None, "gelu"), "activation is 'gelu', expected"),
    ],
)
def test_wrong_arguments_are_named_with_the_right_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(*arguments)


@pytest.fixture
def package(monkeypatch):
    """A causal-conv1d that runs on the CPU, in place of the real one."""
    fake = ModuleType("causal_conv1d")
    fake.calls = []

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, *, activation=None):
        assert seq_idx is None
        last = x.stride(1) == 1
        assert not last or not any(n % 8 for n in (x.shape[1], x.stride(0), x.stride(2)))
        assert last or x.stride(2) == 1
        fake.calls.append("channels last" if last else "contiguous")
        with force("reference", OP):
            return causal_conv1d(x, weight, bias, activation)

    fake.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", fake)
    kernels._module.cache_clear()
    ready = CAUSAL_CONV1D["cuda"]._replace(unsupported=no_reason, unavailable=no_reason)
    monkeypatch.setattr(CAUSAL_CONV1D, "backends", (ready, CAUSAL_CONV1D["reference"]))
    yield fake
    kernels._module.cache_clear()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize(("dim", "layout"), [(8, "channels last"), (6, "contiguous")])
def test_the_package_gets_a_layout_that_it_takes(package, dim, layout, activation, reverse):
    tensors = inputs(dim=dim)
    options = dict(op=OP, reverse=reverse, activation=activation)
    got = results(causal_conv1d, tensors, "cuda", **options)
    assert package.calls == [layout]
    agree(got, results(causal_conv1d, widened(tensors), "reference", **options), torch.float32)


def test_a_package_with_another_signature_is_refused(package):
    package.causal_conv1d_fn = lambda x, weight: x
    with force("cuda", OP), pytest.raises(BackendError, match="does not take our arguments"):
        causal_conv1d(**inputs())


def test_widths_that_the_package_lacks_are_refused_by_name():
    x = torch.ones(1, 2, 3)
    with force("cuda", OP), pytest.raises(BackendError, match="width is 5, expected 2, 3 or 4"):
        causal_conv1d(x, torch.ones(2, 5))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 6])
def test_a_sequence_in_two_parts_is_convolved_as_the_whole(cut, reverse):
    tensors, options = inputs(length=8), dict(activation="silu", reverse=reverse)
    x = tensors.pop("x")
    whole, states = causal_conv1d(x, **tensors, **options, return_final_states=True)
    parts = [x[..., :cut], x[..., cut:]]
    first, then = parts[::-1] if reverse else parts
    y, carried = causal_conv1d(first, **tensors, **options, return_final_states=True)
    out = torch.full_like(carried, torch.nan)
    options |= dict(initial_states=carried, return_final_states=True, final_states_out=out)
    rest, last = causal_conv1d(then, **tensors, **options)
    got = torch.cat([rest, y] if reverse else [y, rest], dim=2)
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-6)
    assert last is out
    assert torch.equal(last, states)
    weights = draw("grad", *whole.shape)
    want = torch.autograd.grad(whole, x, weights, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(got, x, weights)[0], want)


def test_states_are_those_of_a_convolution_by_definition():
    x = torch.tensor([[[1.0, 10.0]]])
    weight, before = torch.tensor([[5.0, 4.0, 3.0, 2.0]]), torch.tensor([[[0.1, 0.2, 0.3]]])
    y, states = causal_conv1d(x, weight, initial_states=before, return_final_states=True)
    torch.testing.assert_close(y[0, 0], torch.tensor([0.5 + 0.8 + 0.9 + 2, 1 + 1.2 + 3 + 20]))
    torch.testing.assert_close(states[0, 0], torch.tensor([0.3, 1.0, 10.0]))
    _, fresh = causal_conv1d(x, weight, return_final_states=True)
    assert fresh[0, 0].tolist() == [0.0, 1.0, 10.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seq_idx=torch.zeros(2, 5)), "seq_idx is given, expected None; convolve packed"),
        (dict(activation=torch.zeros(2, 5)), "activation is tensor"),
        (dict(initial_states=torch.ones(2, 8, 4)), r"initial_states has shape \(2, 8, 4\), exp"),
        (dict(final_states_out=torch.ones(2, 8, 3)), "final_states_out is given, expected None"),
    ],
)
def test_what_the_package_takes_and_we_do_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**inputs(), **options)
