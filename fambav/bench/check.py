"""Whether kernels are right where they run: against float64, on poisoned memory, bit for bit.

Every output is filled with NaN before it is written, and memory that a kernel allocates as well;
each backward pass is made twice, and must give the same bits.  What is compared with is the
reference in float64 on the CPU, with the very numbers that the kernel reads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fambav.bench.candidates import EAGER, REPLAYED, Candidate
from fambav.bench.cases import (
    Found,
    conv,
    gate,
    match,
    mixer,
    norm,
    pool,
    scan,
    scan_forms,
    scan_large,
)
from fambav.bench.report import MeasureError, Report, Row, settings, short
from fambav.bench.scan import training_dtype
from fambav.bench.step import Step, training
from fambav.engine.runtime import numerics
from fambav.engine.timing import interleave, ratio
from fambav.ops import backends
from fambav.ops.kernels import interpreted, kernel_set

ALL = tuple(range(1, 258))
SPREAD = (
    *(1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100),
    *(127, 128, 129, 130, 196, 197, 255, 256, 257),
)
TRAINED = (197, 130, 65, 29)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest error over the largest number of the same tensor: the rounding of a result in its dtype;
# for the mixer that of several results, one made of the other.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
MIXED = {torch.float32: 5e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}

Case = Callable[[str, int, torch.device, torch.dtype], Found]


class Part(NamedTuple):
    """One kernel, or the operation made of several.

    Attributes:
        case: Runs it once for a set of kernels, a length, a device and a dtype.
        op: The operation in whose table the set must be.
        limits: Largest error for each dtype.
        exhaustive: Whether all lengths are tried in the first dtype.
        lengths: Tried otherwise.
    """

    case: Case
    op: str
    limits: Mapping[torch.dtype, float] = LIMITS
    exhaustive: bool = False
    lengths: tuple[int, ...] = SPREAD


PARTS = {
    "scan": Part(scan, "selective_scan", exhaustive=True),
    "scan_forms": Part(scan_forms, "selective_scan"),
    "scan_large": Part(scan_large, "selective_scan", lengths=TRAINED),
    "conv": Part(conv, "causal_conv1d"),
    "gate": Part(gate, "bimamba_scan"),
    "norm": Part(norm, "add_rms_norm"),
    "match": Part(match, "match"),
    "pool": Part(pool, "pool"),
    "mixer": Part(mixer, "bimamba_scan", MIXED),
}
TRAINING = "training"
COST = "what it costs that training repeats itself"


def check(
    *,
    parts: Sequence[str] = (*PARTS, TRAINING),
    kernels: str | None = None,
    lengths: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    updates: int = 50,
    batch: int = 16,
    device: torch.device,
) -> Report:
    """Check kernels against float64, and that training repeats itself.

    Args:
        parts: Which; names of `PARTS`, or "training".
        kernels: Name of the set; by default the one for the device.
        lengths: Tokens to try; by default 1 to 257 for the scan in its first dtype, and a spread of
            them for the rest.
        dtypes: Of the tokens, as far as the set takes them.
        updates: Of the training that is done twice.
        batch: Its images.
        device: Where; Triton's interpreter runs its kernels on a CPU.

    Returns:
        A row for every part and dtype with the worst error, and failures where it is too large;
        with training, also the time of a step with deterministic algorithms over one without.

    Raises:
        MeasureError: If the set cannot run here.
    """
    chosen = kernels or ("triton" if device.type == "cuda" or interpreted() else "numba")
    missing = kernel_set(chosen).missing()
    if missing is not None:
        raise MeasureError(f"kernels are {chosen}, expected some that can run here: {missing}")
    rows: list[dict[str, Any]] = []
    tables: dict[str, tuple[Row, ...]] = {}
    skipped: dict[str, str] = {}
    offered = {(op, name) for op, name, reason in backends() if reason is None}
    with numerics(deterministic=True, matmul_precision="highest"):
        for name in (part for part in parts if part != TRAINING):
            if (PARTS[name].op, chosen) not in offered:
                skipped[name] = f"{PARTS[name].op} has no backend {chosen} that can run here"
                continue
            for dtype in (d for d in dtypes if d in kernel_set(chosen).dtypes):
                exhaustive = PARTS[name].exhaustive and dtype == DTYPES[0]
                tried = lengths or (ALL if exhaustive else PARTS[name].lengths)
                rows.append(_row(name, chosen, tried, device, dtype))
        if TRAINING in parts:
            rows += _repeated(updates, batch, device)
    if TRAINING in parts:  # where nothing else asks for deterministic algorithms
        tables[COST] = (_cost(updates, batch, device),)
    return Report(
        title="kernels against float64",
        settings=settings(device, kernels=chosen, updates=updates, interpreted=interpreted()),
        rows=tuple(rows),
        skipped=skipped,
        failures=tuple(_failure(row) for row in rows if not row["right"]),
        tables=tables,
    )


def _row(
    name: str, kernels: str, lengths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Try all lengths and report the worst."""
    worst, where, part = -1.0, "", PARTS[name]
    for length in lengths:
        for tensor, pair in part.case(kernels, length, device, dtype).items():
            size = error(*pair)
            if size > worst:
                worst, where = size, f"{tensor} at length {length}"
    # The interpreter cuts bfloat16 off where hardware rounds it.
    limit = part.limits[dtype] * (2 if interpreted() else 1)
    return {
        "part": name,
        "dtype": short(dtype),
        "lengths": len(lengths),
        "worst_error": worst,
        "where": where,
        "limit": limit,
        "right": worst <= limit,
    }


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest number expected; infinite for NaN."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    if not found.numel():
        return 0.0
    largest = expected.abs().max().item()
    return float((found - expected).abs().max().item() / (largest or 1.0))


def _failure(row: Mapping[str, Any]) -> str:
    told = f"{row['part']} in {row['dtype']} is off by {row['worst_error']:.3g}"
    return f"{told} in {row['where']}, expected at most {row['limit']:.3g}"


def _repeated(updates: int, batch: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Train twice from one seed, on a GPU once more with passes recorded; compare every bit."""
    first = _trained(updates, batch, device)
    launches = {"again": False} | ({"as CUDA graphs": True} if device.type == "cuda" else {})
    for name, cuda_graphs in launches.items():
        second = _trained(updates, batch, device, cuda_graphs=cuda_graphs)
        differing = [n for n in first if not torch.equal(first[n], second[n])]
        yield {
            "part": f"{TRAINING} {name}",
            "dtype": short(training_dtype(device)),
            "lengths": updates,
            "worst_error": max(error(second[n], first[n]) for n in first),
            "where": differing[0] if differing else f"{updates} updates",
            "limit": 0.0,
            "right": not differing,
        }


def _cost(rounds: int, batch: int, device: torch.device) -> Row:
    """Time steps with deterministic algorithms and steps with any, in turn."""
    step = _training(batch, device)

    def run(*, deterministic: bool) -> None:
        with numerics(deterministic=deterministic, matmul_precision="highest"):
            step.run()

    runs = {exact: partial(run, deterministic=exact) for exact in (True, False)}
    times = interleave(runs, rounds=rounds, warmup=2, device=device)
    return {
        "deterministic_ms": statistics.median(times[True]),
        "any_ms": statistics.median(times[False]),
        "ratio": ratio(times[True], times[False]),
        "rounds": rounds,
    }


def _trained(
    updates: int, batch: int, device: torch.device, *, cuda_graphs: bool = False
) -> dict[str, Tensor]:
    """Return the losses and the weights of a fused model after some updates."""
    step = _training(batch, device, cuda_graphs=cuda_graphs)
    losses = [step.update(iter([step.batch]), number) for number in range(updates)]
    return {"losses": torch.stack(losses), **step.net.state_dict()}


def _training(batch: int, device: torch.device, *, cuda_graphs: bool = False) -> Step:
    large = device.type == "cuda"
    candidate = Candidate(
        "vim_tiny" if large else "vim_micro",
        "upper:6:9" if large else "upper:3:8",
        dtype=training_dtype(device),
        launch=REPLAYED if cuda_graphs else EAGER,
    )
    return training(candidate, batch=batch, device=device)
