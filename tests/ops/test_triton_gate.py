"""The Triton gate against silu in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agreement import agrees_twice, device_of, draw, every_length
from tests.ops.places import LAYOUTS, close, like, place, unwritten_around

pytest.importorskip("triton")

from fambav.ops.triton import gate

DEVICE = device_of("triton")


def inputs(directions, length, dim, dtype=torch.float32):
    """Gradient, y and z."""
    return (
        draw(name, *lead, 2, length, dim, dtype=dtype, device=DEVICE).detach()
        for name, lead in (("grad", ()), ("y", (directions,)), ("z", ()))
    )


def expected(grad, y, z, scale):
    """Out, dy, dz and the total by autograd in float64."""
    y, z = (t.cpu().double().requires_grad_() for t in (y, z))
    out = scale * F.silu(z) * y.sum(0)
    dy, dz = torch.autograd.grad(out, (y, z), grad.cpu().double())
    return out.detach(), dy[0], dz, y.detach().sum(0)


def check(grad, y, z, *, scale=0.5, layout="plain"):
    """Run both kernels and compare all that they write."""
    want = expected(grad, y, z, scale)
    wide = torch.float32
    out, total, dy, dz, again = (
        place(*z.shape, dtype=dtype, layout=layout, device=DEVICE)
        for dtype in (z.dtype, wide, z.dtype, wide, wide)
    )
    gate.gate_forward(y, z, out, total, scale=scale)
    gate.gate_backward(grad, total, z, dy, dz, again, scale=scale)
    for got, right in zip((out, dy, dz, total, again), (*want, want[0]), strict=True):
        close(got, right)
        assert unwritten_around(got)


@every_length((2, torch.float32), (5, torch.bfloat16), (1, torch.float16))
def test_every_length_agrees_on_a_slice_of_rows(length, dtype, record_property):
    grad, y, z = inputs(2, length, 40, dtype)
    z, names = like(z, "slice"), ("out", "dy", "dz", "total")

    def run():
        out, dy, dz, total = (place(*z.shape, dtype=dtype, device=DEVICE) for _ in names)
        gate.gate_forward(y, z, out, total, scale=0.5)
        gate.gate_backward(grad, total, z, dy, dz, scale=0.5)
        return dict(zip(names, (out, dy, dz, total), strict=True))

    want = dict(zip(names, expected(grad, y, z, 0.5), strict=True))
    agrees_twice(run, want, dtype, record_property)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dim", [1, 64, 87, 128])
@pytest.mark.parametrize("length", [1, 2, 5, 17])
def test_both_kernels_agree_with_float64(length, dim, directions):
    check(*inputs(directions, length, dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_no_more_than_its_rounding(dtype):
    check(*inputs(2, 17, 87, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_are_read_and_written(layout):
    check(*(like(t, layout) for t in inputs(2, 5, 3)), layout=layout)


def test_inputs_may_be_one_number_for_all():
    grad, y, z = inputs(2, 5, 3)
    check(grad[:, :1].expand(-1, 5, -1), y[:1].expand(2, -1, -1, -1), z[..., :1].expand(-1, -1, 3))


def test_the_total_can_be_left_out():
    _, y, z = inputs(2, 5, 87)
    out, alone, total = (place(*z.shape, device=DEVICE) for _ in range(3))
    gate.gate_forward(y, z, out, total, scale=2.0)
    gate.gate_forward(y, z, alone, None, scale=2.0)
    assert torch.equal(out, alone)


def test_the_result_is_made_again_only_if_it_is_wanted():
    grad, y, z = inputs(2, 5, 87)
    total, dy, dz, alone = (place(*z.shape, device=DEVICE) for _ in range(4))
    gate.gate_forward(y, z, dy, total, scale=2.0)
    gate.gate_backward(grad, total, z, dy, dz, scale=2.0)
    gate.gate_backward(grad, total, z, alone, dz, torch.empty_like(z), scale=2.0)
    assert torch.equal(dy, alone)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's numpy remarks on infinity
def test_a_gate_far_from_zero_is_open_or_shut():
    grad, y, z = inputs(2, 5, 3)
    check(grad, y, 200 * z.sign())


@pytest.mark.parametrize("name", ["y", "z"])
def test_what_is_no_number_stays_none_and_spreads_no_further(name):
    grad, y, z = inputs(2, 5, 3)
    dict(y=y[1], z=z)[name][1, 2, 1] = float("nan")
    out, total, dy, dz = (place(*z.shape, device=DEVICE) for _ in range(4))
    gate.gate_forward(y, z, out, total, scale=1.0)
    gate.gate_backward(grad, total, z, dy, dz, scale=1.0)
    for got, hit in ((out, True), (dz, True), (dy, name == "z"), (total, name == "y")):
        assert got.isnan().nonzero().tolist() == [[1, 2, 1]] * hit


def test_every_argument_of_a_variant_is_told():
    for variant in gate.variants():
        assert variant.types.keys() | variant.constants.keys() == set(variant.kernel.arg_names)
        assert not variant.types.keys() & variant.constants.keys()
