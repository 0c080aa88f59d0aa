"""Every operation by every backend, on tensors whose strides are not those of a new tensor."""

import pytest
import torch

from fambav.ops import (
    Direction,
    Selection,
    add_rms_norm,
    backends,
    bimamba_scan,
    causal_conv1d,
    force,
    match,
    pool,
    selective_scan,
)
from fambav.ops.scan_aligned import aligned_scan
from tests.ops.agreement import device_of, draw, results

BATCH, LENGTH, DIM, STATE, RANK, WIDTH = 2, 5, 4, 3, 2, 3
TOLERANCE = 1e-4  # a wrong stride is off by the size of a number, or gives NaN
PARAMETERS = (
    *((DIM, WIDTH), (DIM,), (RANK + 2 * STATE, DIM), (DIM, RANK)),
    *((DIM,), (DIM, STATE), (DIM,)),
)


def reversed_axes(x):
    """The first axis is the fastest."""
    axes = range(x.dim())[::-1]
    return x.permute(*axes).contiguous().permute(*axes)


def every_second(x):
    """What lies between spoils every sum, and is no place."""
    between = torch.nan if x.is_floating_point() else 2**40
    return torch.stack((x, torch.full_like(x, between)), dim=-1)[..., 0]


LAYOUTS = {
    "reversed axes": reversed_axes,
    "every second": every_second,
    "last stride 0": lambda x: x[..., :1].expand_as(x),
    "first stride 0": lambda x: x[:1].expand_as(x),
    "all strides 0": lambda x: x.flatten()[0].expand_as(x),
}


def mixer(xz, out_proj, **parameters):
    ends = (Direction(*(parameters[f"{n}_{end}"] for n in Direction._fields)) for end in "fb")
    return bimamba_scan(xz, *ends, out_proj)


# The shapes of what an operation takes, and how it is called.
OPERATIONS = {
    "add_rms_norm": (
        dict(hidden=(LENGTH, DIM), residual=(LENGTH, DIM), weight=(DIM,)),
        add_rms_norm,
    ),
    "causal_conv1d": (
        dict(x=(BATCH, DIM, LENGTH), weight=(DIM, WIDTH), bias=(DIM,)),
        lambda **given: causal_conv1d(**given, activation="silu", reverse=True),
    ),
    "selective_scan": (
        dict.fromkeys(("u", "delta", "z"), (BATCH, DIM, LENGTH))
        | dict.fromkeys("BC", (BATCH, 2, STATE, LENGTH))
        | dict(A=(DIM, STATE), D=(DIM,), delta_bias=(DIM,)),
        lambda **given: selective_scan(**given, delta_softplus=True, return_last_state=True),
    ),
    "aligned_scan": (
        dict.fromkeys(("u", "delta"), (BATCH, LENGTH, DIM))
        | dict.fromkeys("BC", (BATCH, LENGTH, STATE))
        | dict(A=(DIM, STATE), D=(DIM,), delta_bias=(DIM,)),
        lambda **given: aligned_scan(
            **given, skipped=torch.ones_like(given["u"][..., 0]), delta_softplus=True
        )[0],
    ),
    "ordered_scan": (
        dict.fromkeys(("u", "delta", "z"), (BATCH, DIM, LENGTH))
        | dict.fromkeys("BC", (BATCH, 2, STATE, LENGTH))
        | dict(A=(DIM, STATE), D=(DIM,), delta_bias=(DIM,)),
        lambda **given: selective_scan(
            **given, delta_softplus=True, order=torch.tensor([[4, 0], [1, 3], [2, 4]])
        ),
    ),
    "bimamba_scan": (
        dict(xz=(BATCH, LENGTH, 2 * DIM), out_proj=(3, DIM))
        | {
            f"{name}_{end}": shape
            for end in "fb"
            for name, shape in zip(Direction._fields, PARAMETERS, strict=True)
        },
        mixer,
    ),
}
# Compiled packages have their own files of tests.
HERE = [(op, name) for op, name, missing in backends() if missing is None and name != "cuda"]


def offered(*ops):
    return [pair for pair in HERE if pair[0] in ops]


def plain(x):
    return x.contiguous()


def compare(function, tensors, backend, op, layout):
    """Hold results and gradients against those in float64 of plain tensors of the same numbers."""
    lay, there = LAYOUTS[layout], device_of(backend)
    given = {name: lay(x.to(there)).requires_grad_() for name, x in tensors.items()}
    got = results(function, given, backend, op, lay=lay)
    exact = {name: plain(lay(x)).double().requires_grad_() for name, x in tensors.items()}
    want = results(function, exact, "reference", op, lay=lambda x: plain(lay(x)))
    for name, right in want.items():
        error, scale = (got[name].cpu().double() - right).abs().max(), right.abs().max()
        assert error <= TOLERANCE * scale, f"{name} is off by {error:.1e} of {scale:.1e}"


def test_every_operation_is_tried():
    assert {op for op, _, _ in backends()} == {*OPERATIONS, "pool", "match"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "backend"), offered(*OPERATIONS))
def test_results_and_gradients_do_not_depend_on_strides(op, backend, layout):
    shapes, function = OPERATIONS[op]
    tensors = {name: draw(name, *shape).detach() for name, shape in shapes.items()}
    rates = {name: -x.abs() for name, x in tensors.items() if name[0] == "A"}
    compare(function, tensors | rates, backend, op, layout)


def of_places(layout):
    """The layout, if places in it are still distinct."""
    return LAYOUTS[layout if layout not in ("last stride 0", "all strides 0") else "reversed axes"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "backend"), offered("pool"))
def test_means_do_not_depend_on_strides(op, backend, layout):
    weight = LAYOUTS[layout](draw("weight", BATCH, LENGTH).detach().abs() + 0.5)
    groups = ([0, 1, 3], [2, 4], [1, 1]), ([4, 2, 0], [3, 1], [4, 0])
    keep, source, target = (
        of_places(layout)(torch.tensor(places)) for places in zip(*groups, strict=True)
    )

    def means(x, residual):
        here = Selection(*(places.to(x.device) for places in (keep, source, target)))
        pooled = pool(x, residual, weight.to(x.device), weight.to(x.device), here)
        return pooled.x, pooled.residual

    streams = {name: draw(name, BATCH, LENGTH, DIM).detach() for name in ("x", "residual")}
    compare(means, streams, backend, op, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "backend"), offered("match"))
def test_pairs_do_not_depend_on_strides(op, backend, layout):
    device = device_of(backend)
    x = LAYOUTS[layout](draw("x", BATCH, LENGTH, DIM).detach().mul(8).round().to(device))
    masked = of_places(layout)(torch.tensor([[0, 1], [3, 4]], device=device))
    with force(backend, op):
        got, want = match(x, 2, masked=masked), match(plain(x), 2, masked=plain(masked))
    assert all(map(torch.equal, got, want))
