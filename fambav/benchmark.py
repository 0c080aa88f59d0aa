"""Measurements: time and memory of an operation, every backend beside the reference.

Times are medians over rounds in which every candidate runs once, so that a busy machine slows all
of them alike; ratios are taken within a round.  How time grows with length is timed for each
backend alone, so that none meets memory that another has just given back.  Memory is the bytes that
autograd keeps for the backward pass beyond the inputs, counted by hooks: exact on any machine.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.engine.memory import MIB, Saved
from fambav.ops import BackendError, backends, force, selective_scan

REFERENCE = "reference"
SHORT = 65  # tokens of the second, shorter sequence that shows how time grows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One backend.

    Attributes:
        backend: Its name.
        median_ms: Of a forward and a backward pass, in milliseconds.
        quartiles_ms: First and third quartile, in milliseconds.
        speed: Median over rounds of the reference's time divided by this one's.
        saved_mib: Kept for the backward pass beyond the inputs, in MiB.
        growth: Median over rounds of the time at the full length over that at 65 tokens, divided by
            the ratio of the lengths; 1 is proportional.
    """

    backend: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    speed: float
    saved_mib: float
    growth: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What one benchmark measured.

    Attributes:
        settings: What was measured, and on what.
        rows: One for each backend that can run.
        skipped: Backends that cannot run here, with the reason.
    """

    settings: dict[str, Any]
    rows: tuple[Row, ...]
    skipped: dict[str, str]

    def row(self, backend: str) -> Row:
        """Return one row."""
        return next(row for row in self.rows if row.backend == backend)

    def json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def text(self) -> str:
        """Return a table to read."""
        told = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [f"bidirectional scan, forward and backward: {told}", ""]
        lines.append(
            f"{'backend':<12}{'median ms':>10}{'quartiles ms':>18}{'times faster':>14}"
            f"{'saved MiB':>11}{'growth, 1 is proportional':>27}"
        )
        for row in self.rows:
            quartiles = "{:.1f} .. {:.1f}".format(*row.quartiles_ms)
            lines.append(
                f"{row.backend:<12}{row.median_ms:>10.1f}{quartiles:>18}{row.speed:>14.2f}"
                f"{row.saved_mib:>11.1f}{row.growth:>27.2f}"
            )
        lines += [f"{name:<12}not run: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def scan(
    *,
    batch: int = 8,
    length: int = 197,
    dim: int = 384,
    state: int = 16,
    rounds: int = 9,
    warmup: int = 2,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Measure one bidirectional selective scan with all its options, forward and backward.

    The defaults are the scan of Vim-Ti.  The reference is a loop over the tokens under autograd.

    Args:
        batch: Sequences.
        length: Tokens, more than the 65 with which growth is measured.
        dim: Channels of each direction.
        state: Numbers of state for each channel.
        rounds: How often each candidate is timed, at least 1.
        warmup: Rounds before those.
        device: Where.
        dtype: Of the inputs.

    Returns:
        A report with every backend that can run here.

    Raises:
        ValueError: If a number is too small.
    """
    if length <= SHORT:
        raise ValueError(f"length is {length}, expected more than {SHORT}")
    for name, value in dict(batch=batch, dim=dim, state=state, rounds=rounds).items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    drawn = {
        n: _Scan.draw(batch, n, dim, state, device=device, dtype=dtype) for n in (SHORT, length)
    }
    names = [name for op, name, _ in backends() if op == selective_scan.__name__]
    refusals = {name: _refusal(partial(drawn[SHORT].run, name)) for name in names}
    skipped = {name: reason for name, reason in refusals.items() if reason is not None}
    names = [name for name in names if name not in skipped]

    timed = partial(_interleave, rounds=rounds, warmup=warmup, device=device)
    times = timed({name: drawn[length].candidate(name) for name in names})
    rows = []
    for name in names:
        alone = timed({str(n): inputs.candidate(name) for n, inputs in drawn.items()})
        growth = _ratio(alone[str(length)], alone[str(SHORT)]) * SHORT / length
        saved = _saved_bytes(*drawn[length].candidate(name))
        rows.append(_row(name, times, saved=saved, growth=growth))
    sizes = dict(batch=batch, length=length, dim=dim, state=state, rounds=rounds, warmup=warmup)
    return Report(settings=sizes | _machine(device, dtype), rows=tuple(rows), skipped=skipped)


_Candidate = tuple[Callable[[], Tensor], list[Tensor]]  # what runs, and what has a gradient
_Times = dict[str, list[float]]


class _Scan(NamedTuple):
    """Inputs of a bidirectional scan: a gate for both directions, and the others for each."""

    z: Tensor
    directions: tuple[dict[str, Tensor], dict[str, Tensor]]

    @classmethod
    def draw(
        cls, batch: int, length: int, dim: int, state: int, *, device: str, dtype: torch.dtype
    ) -> _Scan:
        """Draw leaves in the layout of a model, (batch, length, dim)."""
        generator = torch.Generator().manual_seed(0)
        wide = torch.promote_types(dtype, torch.float32)

        def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

        def direction() -> dict[str, Tensor]:
            rate = torch.arange(1.0, state + 1).repeat(dim, 1).to(device, wide)
            return dict(
                u=leaf(batch, length, dim),
                delta=leaf(batch, length, dim),
                A=rate.neg().requires_grad_(),
                B=leaf(batch, length, state),
                C=leaf(batch, length, state),
                D=leaf(dim, dtype=wide),
                delta_bias=leaf(dim, dtype=wide),
            )

        return cls(leaf(batch, length, dim), (direction(), direction()))

    def candidate(self, backend: str) -> _Candidate:
        """Return what runs and what has a gradient."""
        leaves = [self.z, *(x for inputs in self.directions for x in inputs.values())]
        return partial(self.run, backend), leaves

    def run(self, backend: str) -> Tensor:
        """Scan both ways, add and gate as a mixer does, (batch, length, dim)."""
        y: list[Tensor] = []
        with force(backend):
            for inputs, reverse in zip(self.directions, (False, True), strict=True):
                views: dict[str, Any] = {n: x.mT if x.dim() == 3 else x for n, x in inputs.items()}
                y.append(selective_scan(**views, delta_softplus=True, reverse=reverse).mT)
        return (y[0] + y[1]) * F.silu(self.z)


def _interleave(
    candidates: dict[str, _Candidate], *, rounds: int, warmup: int, device: str
) -> _Times:
    """Time a forward and a backward pass of every candidate in every round, in milliseconds."""
    times: _Times = {key: [] for key in candidates}
    for turn in range(warmup + rounds):
        for key, (run, leaves) in candidates.items():
            _wait(device)
            start = time.perf_counter()
            y = run()
            torch.autograd.grad(y, leaves, torch.ones_like(y))
            _wait(device)
            if turn >= warmup:
                times[key].append(1000 * (time.perf_counter() - start))
    return times


def _refusal(run: Callable[[], Tensor]) -> str | None:
    """Try a forward pass, and say why it cannot run here, or None."""
    try:
        with torch.no_grad():
            run()
    except BackendError as error:
        return str(error)
    return None


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _saved_bytes(run: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Count the bytes kept for the backward pass, but for those of leaves."""
    saved = Saved(leaves)
    with saved.watch():
        run()
    return saved.peak_bytes


def _row(backend: str, times: _Times, *, saved: int, growth: float) -> Row:
    own = times[backend]
    low, median, high = statistics.quantiles(own, n=4) if len(own) > 1 else own * 3
    return Row(
        backend=backend,
        median_ms=median,
        quartiles_ms=(low, high),
        speed=_ratio(times[REFERENCE], own),
        saved_mib=saved / MIB,
        growth=growth,
    )


def _ratio(above: list[float], below: list[float]) -> float:
    """Divide round by round, and take the median."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _machine(device: str, dtype: torch.dtype) -> dict[str, Any]:
    gpu = torch.device(device).type == "cuda"
    return dict(
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if gpu else platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
