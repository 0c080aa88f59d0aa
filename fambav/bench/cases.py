"""One run of each kernel beside the same in float64 on the CPU, for `fambav.bench.check`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.ops import Direction, add_rms_norm, bimamba_scan, causal_conv1d, force, selective_scan
from fambav.ops.kernels import kernel_set
from fambav.ops.match import Selection, evens_then_odds
from fambav.ops.pool import pool as pooled

Found = dict[str, tuple[Tensor, Tensor]]  # what a kernel made, and what was expected

CPU = torch.device("cpu")
BATCH, DIM, STATE, RANK, OUT = 2, 40, 16, 3, 24
REVERSE = (False, True)
SCALE = 0.5
EPS = 1e-5


class _Draw(NamedTuple):
    """Numbers that differ from case to case, rounded to what a kernel reads.

    Attributes:
        generator: On the CPU.
        device, dtype: Of what is drawn.
    """

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, length: int, device: torch.device, dtype: torch.dtype) -> _Draw:
        return cls(torch.Generator().manual_seed(length), device, dtype)

    def __call__(self, *shape: int, wide: bool = False) -> Tensor:
        """Draw normal numbers; wide ones are float32."""
        numbers = torch.randn(shape, generator=self.generator)
        return numbers.to(self.device, torch.float32 if wide else self.dtype)

    def poisoned(self, *shape: int) -> Tensor:
        """Return NaN everywhere."""
        return torch.full(shape, torch.nan, device=self.device, dtype=self.dtype)


class Form(NamedTuple):
    """What a scan may look like besides its length and dtype.

    Attributes:
        dim, state, groups: Channels, state numbers of each, and groups of channels.
        reverse: Of each direction.
        softplus: Whether delta goes through it.
        channels: Whether there are D and bias.
        last: Whether the last state has a gradient.
        batch: Sequences.
        block: Channels of a program, where a set lets them be chosen; None for its own choice.
    """

    dim: int = DIM
    state: int = STATE
    groups: int = 1
    reverse: tuple[bool, ...] = REVERSE
    softplus: bool = True
    channels: bool = True
    last: bool = True
    batch: int = BATCH
    block: int | None = None


FORMS = (
    Form(dim=384, last=False, block=64),
    Form(dim=87, state=3, softplus=False),
    Form(dim=48, state=8, groups=2, channels=False, last=False),
    Form(dim=64, state=1, groups=4, reverse=(True,)),
    Form(dim=8, state=64, reverse=(False,), last=False),
    Form(dim=33, state=12, reverse=(True, True)),
    Form(dim=192, reverse=(False,), channels=False),
    Form(dim=128, block=128),
)
LARGE = Form(dim=384, batch=128, last=False)


def scan_forms(kernels: str, length: int, device: torch.device, dtype: torch.dtype) -> Found:
    """Scan with other numbers of channels, states and directions, with and without options."""
    return scan(kernels, length, device, dtype, form=FORMS[length % len(FORMS)])


def scan_large(kernels: str, length: int, device: torch.device, dtype: torch.dtype) -> Found:
    """Scan as many channels of as many sequences as in training; compared on the same device."""
    return scan(kernels, length, device, dtype, form=LARGE, exact=device)


def scan(
    kernels: str,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    form: Form = Form(),  # noqa: B008  (it cannot be changed)
    exact: torch.device = CPU,
) -> Found:
    """Scan both ways, forward and backward."""
    draw, run = _Draw.of(length, device, dtype), kernel_set(kernels).load()
    ends, dim, state = range(len(form.reverse)), form.dim, form.state
    u, delta, grad = (draw(len(ends), form.batch, length, dim) for _ in range(3))
    delta = delta if form.softplus else delta.abs() / 4
    more = -2 * state % 16 if length % 2 else RANK  # rows with and without alignment
    rows = draw(len(ends), form.batch, length, form.groups, 2 * state + more)
    A = [-draw(dim, state, wide=True).exp() for _ in ends]
    D, bias = ([draw(dim, wide=True) / 2 for _ in ends] if form.channels else None for _ in "Db")
    bias = bias if form.softplus or bias is None else [each.abs() for each in bias]
    dlast = draw(len(ends), form.batch, dim, state, wide=True) if form.last else None
    given = u, delta, A, rows[..., :state], rows[..., state : 2 * state], D, bias
    options: dict[str, Any] = dict(softplus=form.softplus, reverse=form.reverse)
    if form.block and "block" in inspect.signature(run.scan_forward).parameters:
        options["block"] = form.block
    y = draw.poisoned(*u.shape)
    last, kept = run.scan_forward(*given, y, **options, keep=True)

    def backward() -> dict[str, Tensor]:
        du, ddelta, drows = (draw.poisoned(*t.shape) for t in (u, delta, rows))
        places = du, ddelta, drows[..., :state], drows[..., state : 2 * state]
        dA, dD, dbias = run.scan_backward(grad, dlast, kept, *given, *places, **options)
        found = dict(du=du, ddelta=ddelta, dA=dA, dB=places[2], dC=places[3])
        return found | (dict(dD=dD, dbias=dbias) if form.channels else {})

    found = {"y": y, "last": last, **_same_twice(backward)}
    expected = _scan_expected(form, given, grad, dlast, exact)
    return {name: (found[name], expected[name]) for name in expected}


def _scan_expected(
    form: Form, given: Sequence[Any], grad: Tensor, dlast: Tensor | None, device: torch.device
) -> dict[str, Tensor]:
    """Return what `scan` should find, each for all directions.

    On a GPU the chunks of backend "cpu" stand for the loop, which would keep too much.
    """
    ends = []
    for k, reverse in enumerate(form.reverse):
        leaves = [_exact(tensors[k], device) for tensors in given if tensors is not None]
        u, delta, A, B, C, *channels = leaves
        D, bias = channels or (None, None)
        with force("reference" if device == CPU else "cpu"):
            y, last = selective_scan(
                *(u.mT, delta.mT, A, B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), D),
                delta_bias=bias,
                delta_softplus=form.softplus,
                return_last_state=True,
                reverse=reverse,
            )
        outputs, weights = [y.mT], [grad[k].to(device).double()]
        if dlast is not None:
            outputs, weights = [*outputs, last], [*weights, dlast[k].to(device).double()]
        ends.append([y.mT, last, *torch.autograd.grad(outputs, leaves, weights)])
    names = ("y", "last", "du", "ddelta", "dA", "dB", "dC", *(("dD", "dbias") * form.channels))
    each = zip(names, zip(*ends, strict=True), strict=True)
    return {name: torch.stack(both) for name, both in each}


def conv(kernels: str, length: int, device: torch.device, dtype: torch.dtype) -> Found:
    """Convolve both ways, forward and backward, with 2 to 4 taps."""
    draw, run = _Draw.of(length, device, dtype), kernel_set(kernels).load()
    taps, silu = 2 + length % 3, bool(length % 2)
    x, grad = draw(BATCH, length, DIM), draw(2, BATCH, length, DIM)
    weights, biases = [draw(DIM, taps) for _ in REVERSE], [draw(DIM) for _ in REVERSE]
    u, options = draw.poisoned(*grad.shape), dict(silu=silu, reverse=REVERSE)
    run.conv_forward(x, weights, biases, u, **options)

    def backward() -> dict[str, Tensor]:
        dx = draw.poisoned(*x.shape)
        dweight, dbias = run.conv_backward(grad, x, weights, biases, dx, **options)
        return {"dx": dx, "dweight": dweight, "dbias": dbias}

    found = {"u": u, **_same_twice(backward)}
    leaves = [_exact(t) for t in (x, *weights, *biases)]
    with force("reference", "causal_conv1d"):
        ends = [
            causal_conv1d(leaves[0].mT, weight, bias, "silu" if silu else None, reverse=reverse).mT
            for weight, bias, reverse in zip(leaves[1:3], leaves[3:], REVERSE, strict=True)
        ]
    exact = torch.stack(ends)
    dx, *rest = torch.autograd.grad(exact, leaves, grad.cpu().double())
    expected = {"u": exact, "dx": dx, "dweight": torch.stack(rest[:2])}
    expected["dbias"] = torch.stack(rest[2:])
    return {name: (found[name], expected[name]) for name in expected}


def gate(kernels: str, length: int, device: torch.device, dtype: torch.dtype) -> Found:
    """Add both directions and gate them, forward and backward."""
    draw, run = _Draw.of(length, device, dtype), kernel_set(kernels).load()
    y, z = draw(2, BATCH, length, DIM), draw(BATCH, length, 2 * DIM)[..., DIM:]
    grad = draw(BATCH, length, DIM)
    out, total, dy, dz = (draw.poisoned(*grad.shape) for _ in range(4))
    run.gate_forward(y, z, out, total, scale=SCALE)
    exact_y, exact_z = _exact(y), _exact(z)
    both = exact_y.sum(dim=0)
    exact = SCALE * F.silu(exact_z) * both
    dboth, dexact = torch.autograd.grad(exact, (both, exact_z), grad.cpu().double())
    rounded = both.detach().to(dtype).to(device)  # the backward kernel reads it as it was stored
    run.gate_backward(grad, rounded, z, dy, dz, scale=SCALE)
    return {"out": (out, exact), "total": (total, both), "dy": (dy, dboth), "dz": (dz, dexact)}


def norm(kernels: str, length: int, device: torch.device, dtype: torch.dtype) -> Found:
    """Add to the residual stream and normalise, forward and backward.

    Rows are transposed for odd lengths; for even ones a gradient is one number, as of a sum.
    """
    draw = _Draw.of(length, device, dtype)
    shape = BATCH * length, DIM
    given = [draw(*shape), draw(*shape, wide=True), draw(DIM, wide=True)]
    grads = draw(*shape), draw(*shape, wide=True)
    if length % 2:
        given = [*(rows.mT.contiguous().mT for rows in given[:2]), given[2]]
    else:
        grads = draw(1).expand(shape), grads[1]

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        hidden, residual, weight = inputs
        return add_rms_norm(hidden, residual, weight, eps=EPS)

    names = ("normed", "total", "dhidden", "dresidual", "dweight")
    return _operation("add_rms_norm", kernels, run, given, grads, names)


def mixer(kernels: str, length: int, device: torch.device, dtype: torch.dtype) -> Found:
    """Do all of a bidirectional mixer, forward and backward."""
    draw = _Draw.of(length, device, dtype)

    def direction() -> list[Tensor]:
        rows = RANK + 2 * STATE
        small = draw(rows, DIM) / DIM**0.5, draw(DIM, RANK) / RANK**0.5
        rates = -draw(DIM, STATE, wide=True).exp()
        return [
            *(draw(DIM, 4) / 2, draw(DIM), *small),
            *(draw(DIM, wide=True), rates, draw(DIM, wide=True)),
        ]

    given = [draw(BATCH, length, 2 * DIM), *direction(), *direction(), draw(OUT, DIM) / DIM**0.5]
    fields = Direction._fields

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        xz, *rest, out_proj = inputs
        ends = Direction(*rest[:7]), Direction(*rest[7:])
        return (bimamba_scan(xz, *ends, out_proj, scale=SCALE),)

    both = (f"d{name}{end}" for end in ("", "_b") for name in fields)
    names = ("out", "dxz", *both, "dout_proj")
    return _operation("bimamba_scan", kernels, run, given, (draw(BATCH, length, OUT),), names)


def match(kernels: str, length: int, device: torch.device, dtype: torch.dtype) -> Found:
    """Choose the pairs most alike: their scores must be the best there are, and all tokens stay."""
    if length < 5:
        return {}
    draw = _Draw.of(length, device, dtype)
    x, places = draw(BATCH, length, DIM), torch.full((BATCH, 1), length // 2, device=device)
    count = (length - 3) // 2
    with force(kernels, "match"):
        found = evens_then_odds(x, count, places)
    with force("reference", "match"):
        expected = evens_then_odds(x.cpu().double(), count, places.cpu())
    unit = F.normalize(x.cpu().double(), dim=-1)

    def scores(chosen: Selection) -> Tensor:
        ends = (p.cpu()[..., None].expand(-1, -1, DIM) for p in (chosen.source, chosen.target))
        source, target = (unit.gather(1, end) for end in ends)
        return (source * target).sum(dim=-1).sort(dim=1).values

    everyone = torch.cat((found.keep, found.source), dim=1).sort(dim=1).values
    all_places = torch.arange(length).expand(BATCH, -1)
    return {"scores": (scores(found), scores(expected)), "places": (everyone, all_places)}


def pool(kernels: str, length: int, device: torch.device, dtype: torch.dtype) -> Found:
    """Replace groups by their means in both streams, forward and backward."""
    if length < 5:
        return {}
    draw = _Draw.of(length, device, dtype)
    given = [draw(BATCH, length, DIM), draw(BATCH, length, DIM, wide=True)]
    places, count = torch.full((BATCH, 1), length // 2), (length - 3) // 2
    with force("reference", "match"):
        chosen = evens_then_odds(given[0].cpu().float(), count, places)
    weight = draw(BATCH, length, wide=True).abs() + 1
    grads = draw(BATCH, length - count, DIM), draw(BATCH, length - count, DIM, wide=True)

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x, residual = inputs
        here = Selection(*(place.to(x.device) for place in chosen[:3]))
        sizes = weight.to(x.device)
        left = pooled(x, residual, sizes, sizes, here)
        return left.x, *(() if left.residual is None else (left.residual,))

    return _operation("pool", kernels, run, given, grads, ("x", "residual", "dx", "dresidual"))


def _operation(
    op: str,
    kernels: str,
    run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
    given: Sequence[Tensor],
    grads: Sequence[Tensor],
    names: Sequence[str],
) -> Found:
    """Run an operation by a set of kernels, and the reference in float64, with all gradients."""

    def results(inputs: list[Tensor], weights: Sequence[Tensor]) -> dict[str, Tensor]:
        outputs = run(inputs)
        each = (*outputs, *torch.autograd.grad(outputs, inputs, weights))
        return dict(zip(names, each, strict=True))

    with force(kernels, op):
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        found = _same_twice(lambda: results(leaves, grads))
    with force("reference", op), force("reference"), force("reference", "causal_conv1d"):
        exact = results([_exact(t) for t in given], [g.cpu().double() for g in grads])
    return {name: (found[name], exact[name]) for name in names}


def _exact(tensor: Tensor, device: torch.device = CPU) -> Tensor:
    """Return the same numbers in float64, as a leaf."""
    return tensor.detach().to(device).double().requires_grad_()


def _same_twice(run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Run twice; what differs in a bit becomes NaN, which is never right."""
    first, second = run(), run()
    return {
        name: tensor if torch.equal(tensor, second[name]) else torch.full_like(tensor, torch.nan)
        for name, tensor in first.items()
    }
