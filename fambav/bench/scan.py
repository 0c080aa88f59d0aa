"""One bidirectional selective scan, as a mixer does it, forward and backward by every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.bench.report import Report, Row, settings
from fambav.bench.stack import sift, stack
from fambav.engine.memory import MIB
from fambav.engine.timing import Run, Times, interleave, peak_mib, ratio, spread, with_replays
from fambav.ops import BackendError, selective_scan
from fambav.ops.kernels import kernel_set

LENGTHS = (197, 130, 65, 29)
BATCH = {"cuda": 128, "cpu": 8}
BASELINES = ("cuda", "cpu", "reference")
SETS = ("triton", "numba")
REVERSE = (False, True)
SCALE = 0.5


def scan(
    *,
    batch: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    dim: int = 384,
    state: int = 16,
    rounds: int = 9,
    warmup: int = 2,
    device: torch.device,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
) -> Report:
    """Measure a scan with all its options in both directions, their sum and its gate.

    The defaults are the scan of Vim-Ti.  Fused kernels are called as the mixer calls them, both
    directions at once; the other backends get the layout that they like best.

    Args:
        batch: Sequences; by default 128 on a GPU and 8 on a CPU.
        lengths: Tokens of each sequence.
        dim: Channels of each direction.
        state: Numbers of state for each channel.
        rounds: How often each candidate is timed, at least 1.
        warmup: Rounds before those.
        device: Where.
        dtype: Of the tokens; by default that of training there.
        names: Backends; by default those that suit the device.

    Returns:
        A row for every backend, way to launch it, and length.

    Raises:
        ValueError: If a number is too small.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch, dim=dim, state=state, length=min(lengths, default=0))
    drawn = {n: Inputs.draw(batch, n, dim, state, device=device, dtype=dtype) for n in lengths}
    short = drawn[min(lengths)]
    able, skipped = sift(names, device, lambda name: _attempt(name, short))
    passes: dict[tuple[Any, ...], Pass] = {
        (name, n): passed(name, drawn[n]) for name in able for n in lengths
    }
    runs, refused = with_replays({key: found.run for key, found in passes.items()}, device)
    times = interleave(runs, rounds=rounds, warmup=warmup, device=device)
    memory = {(name, "eager", n): found.peak_mib(device) for (name, n), found in passes.items()}
    return Report(
        title="bidirectional scan, forward and backward",
        settings=settings(device, dtype, batch=batch, dim=dim, state=state, rounds=rounds),
        rows=table(times, memory, lengths),
        skipped=skipped | refused,
    )


def training_dtype(device: torch.device) -> torch.dtype:
    """Return what a run computes in on this device, if nothing else is said."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def positive(**numbers: int) -> None:
    """Refuse a number below 1.

    Raises:
        ValueError: If there is one.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


def table(
    times: dict[tuple[Any, ...], Times],
    memory: dict[tuple[Any, ...], float],
    lengths: Sequence[int],
    baselines: Sequence[str] = BASELINES,
) -> tuple[Row, ...]:
    """Make rows of times and peaks of memory by (backend, launch, length).

    A column `over_NAME` says how many times faster than that backend in the same round; `growth` is
    time over that at the longest length, divided by the ratio of the lengths: 1 is proportional.
    """
    longest = max(lengths)
    rows = []
    for (name, launch, length), own in times.items():
        growth = ratio(own, times.get((name, launch, longest)))
        rows.append(
            {"backend": name, "launch": launch, "length": length}
            | spread(own)
            | {f"over_{b}": ratio(times.get((b, launch, length)), own) for b in baselines}
            | {"peak_mib": memory.get((name, launch, length))}
            | {"growth": None if growth is None else growth * longest / length}
        )
    return tuple(rows)


class Inputs(NamedTuple):
    """What both directions of a mixer hand to their scans.

    Attributes:
        u, delta: (2, batch, length, dim).
        z, grad: Gate and gradient of the result, (batch, length, dim).
        projected: Rows of B, C and what else a mixer projects, (2, batch, length, row).
        A: (dim, state) for each direction; D and bias: (dim,).
    """

    u: Tensor
    delta: Tensor
    z: Tensor
    grad: Tensor
    projected: Tensor
    A: list[Tensor]
    D: list[Tensor]
    bias: list[Tensor]

    @classmethod
    def draw(
        cls,
        batch: int,
        length: int,
        dim: int,
        state: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Inputs:
        """Draw everything, in the layout of a model."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        wide = torch.promote_types(dtype, torch.float32)
        row = -(-(2 * state + dim // 32 + 1) // 16) * 16
        rates = -torch.arange(1.0, state + 1).repeat(dim, 1).to(device, wide)
        return cls(
            u=normal(2, batch, length, dim),
            delta=normal(2, batch, length, dim),
            z=normal(batch, length, dim),
            grad=normal(batch, length, dim),
            projected=normal(2, batch, length, row),
            A=[rates, rates.clone()],
            D=[normal(dim, dtype=wide) for _ in range(2)],
            bias=[normal(dim, dtype=wide) for _ in range(2)],
        )

    def weights(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """View B and C in rows of a projection, (2, batch, length, 1, state)."""
        state, rows = self.A[0].shape[1], projected.unsqueeze(3)
        return rows[..., :state], rows[..., state : 2 * state]


class Pass(NamedTuple):
    """A forward and a backward pass.

    Attributes:
        run: Does both.
        kept: Returns what the forward pass keeps for the backward one beyond its inputs, where
            autograd does not see it; None where it does.
        ignored: Leaves, which are there anyway.
    """

    run: Run
    kept: Callable[[], Sequence[Tensor]] | None = None
    ignored: Sequence[Tensor] = ()

    def peak_mib(self, device: torch.device) -> float:
        """Return the peak memory, in MiB, as `timing.peak_mib` counts it."""
        if device.type == "cpu" and self.kept is not None:
            return sum(tensor.nbytes for tensor in self.kept()) / MIB
        return peak_mib(self.run, device, ignored=self.ignored)


def passed(backend: str, x: Inputs) -> Pass:
    """Return a pass over `x` by one backend."""
    if backend in SETS:
        forward = partial(_forward, backend, x)
        return Pass(partial(_both, backend, x), lambda: forward()[1:])
    leaves = _leaves(x, by_channel=backend == "cuda")
    grad = x.grad.mT.contiguous() if backend == "cuda" else x.grad.mT

    def run() -> object:
        return torch.autograd.grad(_composed(backend, leaves), leaves, grad)

    return Pass(run, ignored=leaves)


def _attempt(backend: str, x: Inputs) -> object:
    """Make a forward pass over one sequence."""
    few = x._replace(
        **{n: getattr(x, n)[:, :1] for n in ("u", "delta", "projected")}, z=x.z[:1], grad=x.grad[:1]
    )
    if backend not in SETS:
        return _composed(backend, _leaves(few, by_channel=False))
    kernels = kernel_set(backend)
    reason = kernels.missing() or kernels.refuses(x.u)
    if reason is not None:
        raise BackendError(reason)
    return _forward(backend, few)


def _forward(backend: str, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gated result, and what is kept: the states, and the sum of both scans."""
    run = kernel_set(backend).load()
    y, out, total = torch.empty_like(x.u), torch.empty_like(x.z), torch.empty_like(x.z)
    given = x.u, x.delta, x.A, *x.weights(x.projected), x.D, x.bias
    _, kept = run.scan_forward(*given, y, softplus=True, reverse=REVERSE, keep=True)
    run.gate_forward(y, x.z, out, total, scale=SCALE)
    return out, kept, total


def _both(backend: str, x: Inputs) -> object:
    """Return all gradients."""
    run = kernel_set(backend).load()
    _, kept, total = _forward(backend, x)
    dy, dz = torch.empty_like(x.z), torch.empty_like(x.z)
    run.gate_backward(x.grad, total, x.z, dy, dz, scale=SCALE)
    du, ddelta, dprojected = (torch.empty_like(t) for t in (x.u, x.delta, x.projected))
    given = x.u, x.delta, x.A, *x.weights(x.projected), x.D, x.bias
    places = du, ddelta, *x.weights(dprojected)
    sums = run.scan_backward(
        dy.expand_as(x.u), None, kept, *given, *places, softplus=True, reverse=REVERSE
    )
    return dz, du, ddelta, dprojected, sums


def _leaves(x: Inputs, *, by_channel: bool) -> list[Tensor]:
    """Return the gate, and for each direction what `selective_scan` takes, as leaves.

    Args:
        x: All of it, channels last.
        by_channel: Lay tokens next to each other, as mamba-ssm's kernels want it.
    """

    def leaf(t: Tensor) -> Tensor:
        t = t.mT if t.dim() == 3 else t
        return (t.contiguous() if by_channel else t).detach().requires_grad_()

    B, C = (w.squeeze(3) for w in x.weights(x.projected))
    found = [leaf(x.z)]
    for k in range(2):
        given = x.u[k], x.delta[k], x.A[k].clone(), B[k], C[k], x.D[k], x.bias[k]
        found += map(leaf, given)
    return found


def _composed(backend: str, leaves: Sequence[Tensor]) -> Tensor:
    """Scan both ways, add and gate, (batch, dim, length)."""
    z, *given = leaves
    with stack(backend):
        ends = zip((given[:7], given[7:]), REVERSE, strict=True)
        y = [_one(*leaves, reverse=reverse) for leaves, reverse in ends]
    return (y[0] + y[1]) * (SCALE * F.silu(z))


def _one(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    *,
    reverse: bool,
) -> Tensor:
    """Scan in one direction."""
    given = u, delta, A, B, C
    return selective_scan(*given, D=D, delta_bias=bias, delta_softplus=True, reverse=reverse)
