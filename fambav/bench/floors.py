"""How far kernels and steps are from what bytes, exponentials and instructions allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from fambav import ahead
from fambav.bench.calls import Calls
from fambav.bench.candidates import EAGER, REPLAYED, Candidate
from fambav.bench.machine import Machine, described, measured
from fambav.bench.report import Report, Row, settings, short
from fambav.bench.scan import positive, training_dtype
from fambav.bench.step import training
from fambav.bench.strategies import Merging
from fambav.bench.work import ADAMW, Shape, Work, block, kernels, merging, products
from fambav.engine.runtime import numerics
from fambav.engine.timing import Run, captured, interleave, spread
from fambav.models import Vim

POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SLOTTED = ("scan_forward", "scan_backward")
STEP = "whole step"
MERGED = 2  # tokens of the merging that is timed on its own; its bytes hardly depend on them


def floors(
    *,
    model: str = "vim_tiny",
    batch: int = 128,
    plan: str = "none",
    rounds: int = 9,
    warmup: int = 2,
    device: torch.device,
    dtype: torch.dtype | None = None,
    name: str = "h200",
    clock_hz: float | None = None,
    table: Path | None = None,
) -> Report:
    """Compare kernels and a whole step with their floors; on a CPU, count the floors alone.

    A floor is the largest of four times: bytes over the bandwidth of a copy, products over the rate
    of a large one, exponentials over the units that make them, and for the scan its instructions,
    as compiled, over what can be issued.  What fits in a GPU's cache may be faster than its bytes.

    Args:
        model: Whose block and step.
        batch: Sequences.
        plan: Which layers fuse how many tokens, for the step.
        rounds: How often each kernel is timed, at least 1.
        warmup: Rounds before those.
        device: A GPU to measure, or a CPU to count on.
        dtype: Of the tokens; bfloat16 by default.
        name: The GPU that is counted for where there is none.
        clock_hz: Highest clock of the GPU's multiprocessors; None to ask nvidia-smi.
        table: What `fambav bench aot` wrote; None to leave instructions out.

    Returns:
        A row for every kernel of a block, and one for the step.

    Raises:
        ValueError: If a number is too small, or the plan cannot be carried out.
        MeasureError: If nobody tells the clock.
    """
    dtype = training_dtype(torch.device("cuda")) if dtype is None else dtype
    positive(batch=batch)
    counting = device.type != "cuda"
    with numerics(deterministic=False, matmul_precision="high"):
        machine = described(name, dtype) if counting else measured(device, dtype, clock_hz=clock_hz)
    net = _sketch(model, plan)
    shape = Shape.of(net, batch=batch, length=net.length, bytes_=dtype.itemsize)
    slots, skipped = slots_of(table, machine.arch, dtype, shape.state)
    works = kernels(shape) | {"merging": merging(shape, MERGED)} | products(shape)
    times: dict[str, list[float]] = {}
    if not counting:
        times = _times(model, plan, shape, device=device, dtype=dtype, rounds=rounds, warmup=warmup)
    rows = [_row(name, work, machine, slots.get(name), times) for name, work in works.items()]
    rows.append(_gap(STEP, step_us(net, shape, machine, slots), {}, times))
    told = dict(machine=machine.name, model=model, batch=batch, plan=plan, rounds=rounds)
    rates = dict(bytes_per_s=machine.bytes, flops_per_s=machine.flops, clock_hz=machine.clock_hz)
    return Report(
        title="floors, counted and not timed" if counting else "floors, and times beside them",
        settings=settings(device, dtype, **told, **{n: f"{v:.3g}" for n, v in rates.items()}),
        rows=tuple(rows),
        skipped=skipped,
    )


def _sketch(model: str, plan: str) -> Vim:
    """Return a model without memory for its weights."""
    return cast(Vim, Candidate(model, plan).network(torch.device("meta")))


def slots_of(
    table: Path | None, arch: int, dtype: torch.dtype, state: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Read how many warp instructions the scans issue for 32 state-steps, the least of all forms.

    Returns:
        The numbers by kernel, and why there is none.
    """
    if table is None or not table.is_file():
        return {}, {"instructions": f"there is no {table or 'table of compiled kernels'}"}
    wanted = {POINTERS[dtype], f"N{state}"}
    found: dict[str, float] = {}
    skipped = {}
    for kernel in SLOTTED:
        forms = [
            row.slots
            for row in ahead.read(table).rows
            if row.arch == arch and row.slots is not None and _is(row.name, kernel, wanted)
        ]
        if forms:
            found[kernel] = min(forms)
        else:
            skipped[f"instructions of {kernel}"] = f"{table} has none for {short(dtype)}, sm_{arch}"
    return found, skipped


def step_us(
    net: Vim, shape: Shape, machine: Machine, slots: Mapping[str, float] | None = None
) -> float:
    """Return the least time of a training step in microseconds, without embedding and head.

    Args:
        net: The model, whose schedule says how many tokens each block has.
        shape: Sizes of its first block.
        machine: Where.
        slots: Warp instructions of kernels for 32 state-steps.
    """
    known = slots or {}
    total = 1e6 * ADAMW * sum(p.numel() for p in net.parameters()) / machine.bytes
    length = net.schedule.start
    for count, left in zip(net.schedule.counts, net.schedule.lengths, strict=True):
        norms = kernels(shape._replace(length=length))
        if count:
            total += machine.floor_us(merging(shape._replace(length=length), count))
        for name, (times, work) in block(shape._replace(length=left)).items():
            before = norms[name] if name.startswith("norm") else work
            total += times * machine.floor_us(before, known.get(name))
        length = left
    return total


def _is(name: str, kernel: str, wanted: Iterable[str]) -> bool:
    """Whether a compiled form is one of this kernel with all wanted words in its name."""
    words = {word.lstrip("*") for word in name.split()}
    return any(word.strip("_").startswith(kernel) for word in words) and words.issuperset(wanted)


def _times(
    model: str,
    plan: str,
    shape: Shape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    warmup: int,
) -> dict[str, list[float]]:
    """Time replays of every kernel, a whole step, and merging in one layer."""
    options: dict[str, Any] = dict(batch=shape.batch, device=device)
    # The CPU launches an eager step's kernels more slowly than a GPU runs them.
    launch = REPLAYED if device.type == "cuda" else EAGER
    whole = Candidate(model, plan, dtype=dtype, launch=launch)
    some = Candidate(model, f"upper:1:{MERGED}", dtype=dtype)
    with numerics(deterministic=False, matmul_precision="high"):
        calls = Calls(shape, "triton", device=device, dtype=dtype)
        runs: dict[str, Run] = {name: captured(run) for name, run in calls.runs().items()}
        runs["merging"] = captured(Merging(training(some, **options), layers=1).run)
        runs[STEP] = training(whole, **options).run
        return interleave(runs, rounds=rounds, warmup=warmup, device=device)


def _row(
    name: str, work: Work, machine: Machine, slots: float | None, times: dict[str, list[float]]
) -> Row:
    return _gap(
        name, machine.floor_us(work, slots), machine.limits_us(work, slots), times, slots=slots
    )


def _gap(
    name: str,
    floor: float,
    limits: Mapping[str, float | None],
    times: dict[str, list[float]],
    slots: float | None = None,
) -> Row:
    """Say what bounds a kernel, and how far from that it is."""
    known = {limit: us for limit, us in limits.items() if us is not None}
    time_us = 1000 * spread(times[name])["median_ms"] if name in times else None
    empty = dict.fromkeys(("bytes_us", "exp_us", "issue_us", "product_us"))
    return {
        "kernel": name,
        **(empty | dict(limits)),
        "slots": slots,
        "bound_by": max(known, key=lambda limit: known[limit]).removesuffix("_us") if known else "",
        "floor_us": floor,
        "time_us": time_us,
        "gap": None if time_us is None else time_us / floor,
    }
