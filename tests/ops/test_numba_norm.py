"""The numba norm: agreement with float64, layouts, and the same bits for any batch and threads."""

import pytest
import torch

from tests.ops.agreement import agree, draw
from tests.ops.places import place, unwritten_around

pytest.importorskip("numba")
from fambav.ops import numba as numba_kernels

EPS = 1e-5
BOTH = ("residual", "grad_total")


def drawn(rows=9, dim=24, samples=3, left_out=()):
    """Inputs of a norm and the gradients of what it returns."""
    each = {n: draw(n, rows, dim).detach() for n in ("hidden", "grad", *BOTH)}
    each |= dict(weight=draw("weight", dim).detach(), factor=draw("factor", samples).detach())
    return each | dict.fromkeys(left_out)


def expected(given):
    """Results and gradients of PyTorch in float64, under their names."""
    x = {n: None if t is None else t.double().requires_grad_() for n, t in given.items()}
    total = x["hidden"]
    if x["factor"] is not None:
        total = total * x["factor"].repeat_interleave(len(total) // len(x["factor"]))[:, None]
    total = total if x["residual"] is None else total + x["residual"]
    scale = torch.rsqrt(total.square().mean(dim=1, keepdim=True) + EPS)
    normed = total * scale * x["weight"]
    names = [n for n in ("hidden", "residual", "weight") if x[n] is not None]
    outputs, grads = [normed], [x["grad"]]
    if x["grad_total"] is not None:
        outputs, grads = [normed, total], [x["grad"], x["grad_total"]]
    found = torch.autograd.grad(outputs, [x[n] for n in names], grads)
    values = dict(normed=normed, total=total, scale=scale[:, 0])
    return {n: t.detach() for n, t in values.items()} | dict(zip(names, found, strict=True))


def computed(given, layout="plain"):
    """Results and gradients of the kernels, under their names."""
    hidden, residual, weight, factor = (
        given[n] for n in ("hidden", "residual", "weight", "factor")
    )
    normed, total, dhidden, dresidual = (
        place(*hidden.shape, dtype=torch.float32, layout=layout, device="cpu") for _ in range(4)
    )
    dresidual = None if residual is None else dresidual
    forward = numba_kernels.add_rms_norm_forward
    scale = forward(hidden, residual, weight, normed, total, eps=EPS, factor=factor)
    inputs = given["grad"], given["grad_total"], total, weight, scale
    dweight = numba_kernels.add_rms_norm_backward(*inputs, dhidden, dresidual, factor=factor)
    assert all(unwritten_around(x) for x in (normed, total, dhidden))
    found = dict(normed=normed, total=total, scale=scale, hidden=dhidden, weight=dweight)
    return found if residual is None else found | dict(residual=dresidual)


@pytest.mark.parametrize("left_out", [(), ("factor",), ("residual",), ("grad_total",)], ids=str)
@pytest.mark.parametrize("dim", [10, 16, 87])
@pytest.mark.parametrize("rows", [3, 33, 2100])
def test_it_agrees_with_pytorch_in_float64(rows, dim, left_out):
    given = drawn(rows, dim, left_out=left_out)
    agree(computed(given), expected(given), torch.float32)


def test_rows_may_be_cut_from_wider_ones_and_inputs_have_any_strides():
    given = drawn(left_out=("factor",))
    turned = {n: x if n in ("factor", "weight") else x.T.contiguous().T for n, x in given.items()}
    for name, x in computed(turned, layout="slice").items():
        torch.testing.assert_close(x, computed(given)[name], rtol=0, atol=0)


def test_a_row_has_the_same_bits_in_a_batch_of_any_size():
    given = drawn(300, 87, samples=100)
    part = {n: x if n == "weight" else x[: len(x) // 3] for n, x in given.items()}
    whole, small = computed(given), computed(part)
    for name in whole.keys() - {"weight"}:
        assert torch.equal(whole[name][:100], small[name]), name


def test_threads_change_no_bit():
    given, threads = drawn(2100, 87), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(computed(given))
    finally:
        torch.set_num_threads(threads)
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name
