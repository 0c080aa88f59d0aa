"""Time and memory of candidates that take turns.

Every candidate runs once in every round, so that a busy machine slows all of them alike, and ratios
are taken within a round.  On a GPU a turn lies between two events and is repeated until it is long
enough to be measured; on a CPU, or if each run is to be alone, it lies between two readings of the
clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fambav.engine.memory import MIB, SavedBytes, allocated_peak

Run = Callable[[], object]
Times = list[float]
Key = TypeVar("Key", bound=Hashable)

LEAST_MS = 3.0  # between two events
MOST = 100  # runs between them
WARM = 3  # runs before a capture


def interleave(
    candidates: Mapping[Key, Run],
    *,
    rounds: int,
    warmup: int,
    device: torch.device,
    alone: bool = False,
) -> dict[Key, Times]:
    """Time every candidate in every round.

    Args:
        candidates: What runs, in the order of a round.
        rounds: How often each is timed, at least 1.
        warmup: Rounds before those.
        device: Where they run.
        alone: From an idle device until it is idle again, by the clock, as whoever waits for one
            result does; otherwise a GPU may launch a run while it computes the one before.

    Returns:
        Milliseconds of one run, for each round.

    Raises:
        ValueError: If there are too few rounds.
    """
    for name, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    for _ in range(warmup):
        for run in candidates.values():
            run()
    queued = device.type == "cuda" and not alone
    clock = _events if queued else partial(_clock, device=device)
    repeats = {key: _repeats(run) if queued else 1 for key, run in candidates.items()}
    times: dict[Key, Times] = {key: [] for key in candidates}
    for _ in range(rounds):
        for key, run in candidates.items():
            times[key].append(clock(run, repeats[key]))
    return times


def first_ms(run: Run, device: torch.device) -> float:
    """Return the milliseconds of one run: of the first, with all that is compiled for it."""
    return _clock(run, 1, device=device)


def _clock(run: Run, repeats: int, *, device: torch.device) -> float:
    settle(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    settle(device)
    return 1000 * (time.perf_counter() - start) / repeats


def settle(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _events(run: Run, repeats: int) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / repeats


def _repeats(run: Run) -> int:
    return max(1, min(MOST, math.ceil(LEAST_MS / max(_events(run, 1), 1e-3))))


def captured(run: Run) -> Run:
    """Record the kernels of a run as a CUDA graph, and return what launches them all at once.

    Raises:
        RuntimeError: If something in it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Run = graph.replay
    return replay


def with_replays(
    candidates: Mapping[tuple[Any, ...], Run], device: torch.device
) -> tuple[dict[tuple[Any, ...], Run], dict[str, str]]:
    """Put a replay beside every candidate on a GPU, where launches may take longer than kernels.

    Args:
        candidates: What runs, by a key whose first part is a name.
        device: Where.

    Returns:
        What runs, by the same keys with "eager" or "replayed" put second, and why something cannot
        be replayed.
    """
    found: dict[tuple[Any, ...], Run] = {}
    refused: dict[str, str] = {}
    for (name, *rest), run in candidates.items():
        eager, replayed = (name, "eager", *rest), (name, "replayed", *rest)
        found[eager] = run
        if device.type == "cuda":
            try:
                found[replayed] = captured(run)
            except RuntimeError as error:
                refused[" ".join(map(str, replayed))] = str(error).splitlines()[0]
    return found, refused


def peak_mib(run: Run, device: torch.device, *, ignored: Iterable[Tensor] = ()) -> float:
    """Return the peak memory of a run in MiB.

    On a GPU, what is allocated above what was there before; on a CPU, the bytes that autograd keeps
    for the backward pass but for those of `ignored`, counted by hooks: exact on any machine.
    """
    if device.type == "cuda":
        return allocated_mib(run, device)
    saved = SavedBytes(ignored)
    with saved.watch():
        run()
    return saved.peak_bytes / MIB


def allocated_mib(run: Run, device: torch.device) -> float:
    """Return the peak memory that PyTorch allocates in a run above what was there, in MiB.

    On a CPU this is exact, and leaves out what libraries allocate for themselves.
    """
    if device.type != "cuda":
        return allocated_peak(run) / MIB
    settle(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    settle(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def spread(times: Times) -> dict[str, Any]:
    """Return the median and the quartiles of one candidate."""
    low, median, high = quartiles(times)
    return {"median_ms": median, "quartiles_ms": (low, high)}


def quartiles(values: Sequence[float]) -> Sequence[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else (*values,) * 3


def ratio(above: Times | None, below: Times | None) -> float | None:
    """Divide round by round and take the median; None if one of them was not run."""
    if above is None or below is None:
        return None
    return statistics.median(ratios(above, below))


def ratios(above: Times, below: Times) -> Times:
    """Divide round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]
