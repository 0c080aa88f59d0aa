"""The Triton normalisation against its equation in float64."""

import pytest
import torch

from tests.ops.agreement import device_of, draw
from tests.ops.places import close, place, unwritten_around

pytest.importorskip("triton")

from fambav.ops.triton import norm

DEVICE = device_of("triton")
EPS = 1e-5
CUTS = ["plain", "slice"]


def inputs(rows, dim, dtype=torch.float32):
    """Hidden state and the gradient of normed in `dtype`; residual, its gradient and weight."""
    hidden, pull, residual, grad = (
        draw(name, rows, dim, dtype=kind, device=DEVICE).detach()
        for name, kind in (
            ("hidden", dtype),
            ("pull", dtype),
            ("residual", torch.float32),
            ("grad", torch.float32),
        )
    )
    return hidden, pull, residual, grad, draw("weight", dim, device=DEVICE).detach()


def expected(hidden, pull, residual, grad, weight):
    """Normed, total, scale, their gradient and that of the weight by autograd in float64."""
    total = hidden.cpu().double() + (0 if residual is None else residual.cpu().double())
    leaves = [total.requires_grad_(), weight.cpu().double().requires_grad_()]
    scale = 1 / torch.sqrt(total.square().mean(1, keepdim=True) + EPS)
    normed = total * scale * leaves[1]
    d, dweight = torch.autograd.grad(normed, leaves, pull.cpu().double())
    d = d if grad is None else d + grad.cpu().double()
    return [t.detach() for t in (normed, total, scale[:, 0], d, d, dweight)]


def check(hidden, pull, residual, grad, weight, *, layout="plain"):
    """Run both kernels and compare all that they write."""
    want = expected(hidden, pull, residual, grad, weight)
    normed, total, dhidden, dresidual = (
        place(*hidden.shape, dtype=dtype, layout=layout, device=DEVICE)
        for dtype in (hidden.dtype, torch.float32) * 2
    )
    scale = norm.add_rms_norm_forward(hidden, residual, weight, normed, total, eps=EPS)
    dweight = norm.add_rms_norm_backward(
        pull, grad, total, weight, scale, dhidden, None if residual is None else dresidual
    )
    assert scale.dtype == dweight.dtype == torch.float32
    if residual is None:
        assert dresidual.isnan().all()
        dresidual.copy_(dhidden)
    for got, right in zip((normed, total, scale, dhidden, dresidual, dweight), want, strict=True):
        close(got, right)
    for written in (normed, total, dhidden, dresidual):
        assert unwritten_around(written)


@pytest.mark.parametrize("dim", [1, 64, 87, 192, 384, 768])
@pytest.mark.parametrize("rows", [1, 2, 5, 17])
def test_both_kernels_agree_with_float64(rows, dim):
    check(*inputs(rows, dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_no_more_than_its_rounding(dtype):
    check(*inputs(17, 87, dtype))


@pytest.mark.parametrize("left_out", ["residual", "grad"])
def test_a_residual_or_a_gradient_of_the_sum_can_be_left_out(left_out):
    names = ("hidden", "pull", "residual", "grad", "weight")
    tensors = dict(zip(names, inputs(5, 64), strict=True))
    check(**tensors | {left_out: None})


def test_rows_may_lie_at_any_distance():
    *rows, weight = inputs(5, 87)
    apart = [place(*t.shape, layout="slice", device=DEVICE).copy_(t) for t in rows]
    check(*apart, torch.stack((weight, weight), dim=1)[:, 1], layout="slice")
    check(rows[0][:1].expand(5, -1), *rows[1:], weight)


@pytest.mark.parametrize("programs", [1, 2, 1000])
def test_the_number_of_partial_sums_changes_only_their_order(programs, monkeypatch):
    monkeypatch.setattr(norm, "MOST_PROGRAMS", programs)
    check(*inputs(21, 192))


def test_a_sum_is_rounded_before_it_is_normalised():
    hidden, _, residual, _, weight = inputs(5, 64, torch.bfloat16)
    residual = residual.bfloat16()
    total, normed = (place(5, 64, dtype=d, device=DEVICE) for d in (torch.bfloat16, torch.float32))
    scale = norm.add_rms_norm_forward(hidden, residual, weight, normed, total, eps=EPS)
    close(total, hidden.cpu().double() + residual.cpu().double())
    exact = total.cpu().double()
    close(scale, 1 / torch.sqrt(exact.square().mean(1) + EPS))
    close(normed, exact * scale.cpu().double()[:, None] * weight.cpu().double())


def test_zeros_stay_zero_and_large_numbers_finite():
    zero = torch.zeros(2, 64, device=DEVICE)
    weight = torch.ones(64, device=DEVICE)
    normed, total = (place(2, 64, device=DEVICE) for _ in range(2))
    scale = norm.add_rms_norm_forward(zero, None, weight, normed, total, eps=EPS)
    assert not normed.any()
    assert not total.any()
    close(scale, torch.full((2,), EPS, dtype=torch.float64).rsqrt())


def test_two_equal_calls_give_equal_bits():
    hidden, pull, residual, grad, weight = inputs(17, 192)
    found = []
    for _ in range(2):
        normed, total, d, other = (place(17, 192, device=DEVICE) for _ in range(4))
        scale = norm.add_rms_norm_forward(hidden, residual, weight, normed, total, eps=EPS)
        dweight = norm.add_rms_norm_backward(pull, grad, total, weight, scale, d, other)
        assert torch.equal(d, other)
        found.append((normed, total, scale, d, dweight))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_no_number_spoils_its_row_and_channel_only():
    hidden, pull, residual, grad, weight = inputs(5, 87)
    hidden[3, 7] = float("nan")
    normed, total, d, other = (place(5, 87, device=DEVICE) for _ in range(4))
    scale = norm.add_rms_norm_forward(hidden, residual, weight, normed, total, eps=EPS)
    dweight = norm.add_rms_norm_backward(pull, grad, total, weight, scale, d, other)
    row = torch.arange(5)[:, None].expand(5, 87) == 3
    assert torch.equal(normed.isnan().cpu(), row)
    assert torch.equal(d.isnan().cpu(), row)
    assert total.isnan().nonzero().tolist() == [[3, 7]]
    assert scale.isnan().nonzero().tolist() == [[3]]
    assert dweight.isnan().all()


def test_every_argument_of_a_variant_is_told():
    for variant in norm.variants():
        assert variant.types.keys() | variant.constants.keys() == set(variant.kernel.arg_names)
        assert not variant.types.keys() & variant.constants.keys()
