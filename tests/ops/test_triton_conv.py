"""The Triton convolution against the one of PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agreement import agrees_twice, device_of, draw, every_length
from tests.ops.places import LAYOUTS, close, like, place, unwritten_around

pytest.importorskip("triton")

from fambav.ops.triton import conv

DEVICE = device_of("triton")
BOTH = (False, True)
WAYS = [(False,), (True,), BOTH]


def inputs(ways, length, dim=8, width=4, *, biased=True, dtype=torch.float32, wide=torch.float32):
    """Gradient of u, x, weights and biases."""
    du = draw("du", len(ways), 2, length, dim, dtype=dtype, device=DEVICE).detach()
    x = draw("x", 2, length, dim, dtype=dtype, device=DEVICE).detach()
    names = [f"{name}{k}" for k in range(len(ways)) for name in ("weight", "bias")]
    weight = [draw(n, dim, width, dtype=wide, device=DEVICE).detach() for n in names[::2]]
    bias = [draw(n, dim, dtype=wide, device=DEVICE).detach() for n in names[1::2]]
    return du, x, weight, bias if biased else None


def expected(du, x, weight, bias, *, silu, reverse):
    """U, dx, dweight and dbias by autograd in float64."""
    x = x.cpu().double().requires_grad_()
    weight = [w.cpu().double().requires_grad_() for w in weight]
    bias = [None] * len(weight) if bias is None else [b.cpu().double() for b in bias]
    leaves = [x, *weight, *(b.requires_grad_() for b in bias if b is not None)]
    u = []
    for w, b, back in zip(weight, bias, reverse, strict=True):
        seen = (x.flip(1) if back else x).mT
        y = F.conv1d(F.pad(seen, (w.shape[1] - 1, 0)), w[:, None], b, groups=x.shape[2]).mT
        y = y.flip(1) if back else y
        u.append(F.silu(y) if silu else y)
    u = torch.stack(u)
    dx, *rest = torch.autograd.grad(u, leaves, du.cpu().double())
    sums = [torch.stack(rest[i : i + len(u)]) for i in range(0, len(rest), len(u))]
    return u.detach(), dx, *sums


def check(tensors, *, silu, reverse, layout="plain"):
    """Run both kernels and compare all that they write."""
    du, x, weight, bias = tensors
    want = expected(*tensors, silu=silu, reverse=reverse)
    options = dict(silu=silu, reverse=reverse)
    u = place(*du.shape, dtype=du.dtype, layout=layout, device=DEVICE)
    conv.conv_forward(x, weight, bias, u, **options)
    close(u, want[0])
    assert unwritten_around(u)
    dx = place(*x.shape, dtype=x.dtype, layout=layout, device=DEVICE)
    dweight, dbias = conv.conv_backward(du, x, weight, bias, dx, **options)
    close(dx, want[1])
    assert unwritten_around(dx)
    assert dweight.dtype == torch.float32
    close(dweight, want[2])
    assert (dbias is None) == (bias is None)
    if bias is not None:
        close(dbias, want[3])


@every_length((2, torch.float32), (5, torch.bfloat16), (1, torch.float16))
def test_every_length_agrees_with_two_to_four_taps(length, dtype, record_property):
    tensors = inputs(BOTH, length, 40, 2 + length % 3, dtype=dtype, wide=dtype)
    options = dict(silu=bool(length % 2), reverse=BOTH)
    names = ("u", "dx", "dweight", "dbias")

    def run():
        u, dx = (place(*t.shape, dtype=dtype, device=DEVICE) for t in tensors[:2])
        conv.conv_forward(*tensors[1:], u, **options)
        return dict(zip(names, (u, dx, *conv.conv_backward(*tensors, dx, **options)), strict=True))

    want = dict(zip(names, expected(*tensors, **options), strict=True))
    agrees_twice(run, want, dtype, record_property)


@pytest.mark.parametrize("reverse", WAYS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 5, 17])
def test_both_kernels_agree_with_float64(length, reverse):
    check(inputs(reverse, length), silu=True, reverse=reverse)


def test_directions_come_in_any_order():
    check(inputs((True, False), 6), silu=True, reverse=(True, False))
    check(inputs((True, True), 6), silu=True, reverse=(True, True))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_width_agrees_with_and_without_bias_and_silu(width, biased, silu):
    check(inputs(BOTH, 5, 3, width, biased=biased), silu=silu, reverse=BOTH)


@pytest.mark.parametrize(("dim", "width"), [(1, 4), (64, 4), (87, 4), (128, 4), (3, 8)])
def test_every_number_of_channels_and_taps_agrees(dim, width):
    check(inputs(BOTH, 5, dim, width), silu=True, reverse=BOTH)


@pytest.mark.parametrize("wide", [torch.float32, None], ids=["float32 weights", "same weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_no_more_than_its_rounding(dtype, wide):
    check(inputs(BOTH, 6, dtype=dtype, wide=wide or dtype), silu=True, reverse=BOTH)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_are_read_and_written(layout):
    du, x, weight, bias = inputs(BOTH, 5, 3)
    weight = [w.mT.contiguous().mT for w in weight]
    bias = [torch.stack((b, b), dim=1)[:, 0] for b in bias]
    check((like(du, layout), like(x, layout), weight, bias), silu=True, reverse=BOTH, layout=layout)


def test_one_gradient_serves_both_directions():
    du, *rest = inputs(BOTH, 5)
    check((du[:1].expand(2, -1, -1, -1), *rest), silu=True, reverse=BOTH)


@pytest.mark.parametrize("steps", [4, 8])
def test_the_length_of_a_stretch_changes_nothing_but_the_order_of_sums(steps, monkeypatch):
    monkeypatch.setattr(conv, "MOST_STEPS", steps)
    monkeypatch.setattr(conv, "FEWEST_STEPS", steps)
    check(inputs(BOTH, 14, 3), silu=True, reverse=BOTH)


@pytest.mark.parametrize("length", [1, 65, 197, 1000])
@pytest.mark.parametrize("batch", [1, 128])
def test_stretches_cover_every_step_once(batch, length):
    form = conv._form(384, 4, BOTH, silu=True, channels=64)
    stretch, rows = conv._stretches((batch, length, 384), form)
    count, rest = divmod(rows, batch)
    assert rest == 0
    assert stretch % conv.ROWS == 0
    assert (count - 1) * stretch < length + 3 <= count * stretch


def test_two_equal_calls_give_equal_bits():
    tensors = inputs(BOTH, 17, dtype=torch.bfloat16)
    found = []
    for _ in range(2):
        dx = place(*tensors[1].shape, device=DEVICE)
        dweight, dbias = conv.conv_backward(*tensors, dx, silu=True, reverse=BOTH)
        found.append((dx, dweight, dbias))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_no_number_stays_none_and_spreads_no_further():
    du, x, weight, bias = inputs(BOTH, 12, 3)
    x[0, 6, 1] = float("nan")
    u, dx = place(*du.shape, device=DEVICE), place(*x.shape, device=DEVICE)
    conv.conv_forward(x, weight, bias, u, silu=True, reverse=BOTH)
    want = torch.zeros(2, 2, 12, 3, dtype=torch.bool)
    want[0, 0, 6:10, 1] = want[1, 0, 3:7, 1] = True
    assert torch.equal(u.isnan().cpu(), want)
    dweight, dbias = conv.conv_backward(du, x, weight, bias, dx, silu=True, reverse=BOTH)
    assert torch.equal(dx.isnan().nonzero().cpu()[:, 1].unique(), torch.arange(3, 10))
    assert torch.equal(dx.isnan().any(1).nonzero().cpu(), torch.tensor([[0, 1]]))
    for sums in (dweight[..., 0], dbias):
        assert torch.equal(sums.isnan().cpu(), torch.tensor([[False, True, False]] * 2))


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's numpy remarks on infinity
def test_large_numbers_are_gated_without_overflow():
    du, x, weight, bias = inputs(BOTH, 5)
    check((du, 200 * x, weight, bias), silu=True, reverse=BOTH)


def test_every_argument_of_a_variant_is_told():
    for variant in conv.variants():
        assert variant.types.keys() | variant.constants.keys() == set(variant.kernel.arg_names)
        assert not variant.types.keys() & variant.constants.keys()
