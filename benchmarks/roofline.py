"""Roofline model of the kernels and of a training step.

    python benchmarks/roofline.py --plan upper:6:9

The lower bound of the time of some work is the largest of four: bytes over the bandwidth of a copy,
products over the throughput of a large one, exponentials over the special function units, and for
the scan its instructions, as counted by `aot.py`, over the issue rate.  What fits in the cache may
be faster than its bytes.  Without a GPU the bounds are computed from a data sheet.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from aot import read
from kernels import Calls

from fambav.bench.candidates import EAGER, REPLAYED, Candidate
from fambav.bench.operations import Inputs
from fambav.bench.passes import training
from fambav.bench.report import (
    MeasureError,
    Report,
    Row,
    device_name,
    dtype_name,
    positive,
    settings,
    training_dtype,
)
from fambav.bench.roofline import Roofline
from fambav.bench.strategies import Merging
from fambav.bench.timing import Run, captured, interleave, spread
from fambav.cli import guarded
from fambav.commands.bench import add_flags, measure
from fambav.commands.parser import Parser
from fambav.engine.precision import determinism_settings
from fambav.layers import Block, Mamba
from fambav.models import Vim
from fambav.ops.kept_states import triton_shape

TABLE = Path(__file__).with_name("aot.json")
WARP = 32  # lanes
SCHEDULERS = 4  # of a multiprocessor, each of which issues one warp instruction per cycle
SFU_LANES = 16  # special function units of a multiprocessor: exponentials and logarithms
FP32 = 4  # bytes of an element of the residual stream
ADAMW = 28  # bytes per weight: read and write weight and both moments, read the gradient
POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
COUNTED = ("scan_forward", "scan_backward")  # kernels with counted instructions
STEP = "whole step"
LIMITS = ("bytes_us", "exp_us", "issue_us", "product_us")
MERGED = 2  # tokens of the merging timed on its own; its bytes hardly depend on them


class Shape(NamedTuple):
    """Sizes of a block.

    Attributes:
        batch, length: Sequences and tokens of each.
        dim, inner: Width of a token outside and inside the mixer.
        state: State size of each channel.
        rank: Width of dt.
        itemsize: Bytes of an element.
    """

    batch: int
    length: int
    dim: int
    inner: int
    state: int
    rank: int
    itemsize: int

    @classmethod
    def of(cls, net: Vim, *, batch: int, itemsize: int) -> Shape:
        """Return the sizes of the blocks of a model that fuses no tokens."""
        mixer = cast(Mamba, cast(Block, net.layers[0]).mixer)
        rank, state, _ = mixer.splits
        inner = len(mixer.conv1d.weight)
        return cls(batch, net.length, net.dim, inner, state, rank, itemsize)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.batch * self.length


class Work(NamedTuple):
    """Minimum work of one kernel.

    Attributes:
        bytes: Read and written.
        exps: Exponentials and logarithms.
        steps: State-steps: one element of the state of one channel at one token.
        flops: Of matrix products.
    """

    bytes: float
    exps: float = 0
    steps: float = 0
    flops: float = 0


def kernel_work(s: Shape) -> dict[str, Work]:
    """Return the work of each kernel of a block other than matrix products.

    Each kernel reads each of its inputs once and writes each of its outputs once.
    """
    channels = s.tokens * s.inner
    inner, narrow = channels * s.itemsize, s.tokens * s.dim * s.itemsize
    residual = s.tokens * s.dim * FP32
    steps = 2 * channels * s.state
    BC = 2 * s.tokens * 2 * s.state * s.itemsize
    kept = min(FP32, s.itemsize) * math.prod(triton_shape(2, s.batch, s.length, s.inner, s.state))
    scale = s.tokens * FP32
    return {
        "scan_forward": Work(6 * inner + BC + kept, steps + 4 * channels, steps),
        "scan_backward": Work(9 * inner + 2 * BC + kept, steps + 6 * channels, steps),
        "conv_forward": Work(3 * inner, 2 * channels),
        "conv_backward": Work(4 * inner, 2 * channels),
        "gate_forward": Work(5 * inner, channels),
        "gate_backward": Work(5 * inner, channels),
        "norm_forward": Work(2 * (narrow + residual) + scale),
        "norm_backward": Work(2 * narrow + 3 * residual + scale),
    }


def product_work(s: Shape) -> dict[str, Work]:
    """Return the work of each matrix product of a block, forward and backward together."""
    inner, narrow = s.tokens * s.inner * s.itemsize, s.tokens * s.dim * s.itemsize
    rows = 2 * s.tokens * (s.rank + 2 * s.state) * s.itemsize
    dt = 2 * s.tokens * s.rank * s.itemsize

    def both(read: float, written: float, weights: float, times: int = 3) -> Work:
        """Count a product and its two gradients; once more if it is recomputed."""
        return Work(times * (read + written), flops=2 * times * s.tokens * weights)

    return {
        "in_proj": both(narrow, 2 * inner, 2 * s.dim * s.inner),
        "x_proj": both(2 * inner, rows, 2 * s.inner * (s.rank + 2 * s.state)),
        "dt_proj": both(dt, 2 * inner, 2 * s.rank * s.inner, times=4),
        "out_proj": both(inner, narrow, s.inner * s.dim),
    }


def merging_work(s: Shape, count: int) -> Work:
    """Return the work of pooling both streams, forward and backward."""
    tokens = s.tokens + s.batch * (s.length - count)
    return Work(2 * tokens * s.dim * (s.itemsize + FP32))


class Machine(NamedTuple):
    """A GPU.

    Attributes:
        name: Of the GPU.
        arch: Compute capability without its dot.
        bytes: Memory bandwidth per second, reads and writes.
        flops: Of matrix products per second.
        multiprocessors: Their number.
        clock_hz: Their maximum clock.
    """

    name: str
    arch: int
    bytes: float
    flops: float
    multiprocessors: int
    clock_hz: float

    def limits_us(self, work: Work, slots: float | None = None) -> dict[str, float | None]:
        """Return the lower bound in microseconds by each resource.

        Args:
            work: Of a kernel.
            slots: Warp instructions per 32 state-steps; None if they were not counted.
        """
        cycles = self.multiprocessors * self.clock_hz
        issued = None if slots is None else work.steps / WARP * slots / (SCHEDULERS * cycles)
        return {
            "bytes_us": 1e6 * work.bytes / self.bytes,
            "exp_us": 1e6 * work.exps / (SFU_LANES * cycles),
            "issue_us": None if issued is None else 1e6 * issued,
            "product_us": 1e6 * work.flops / self.flops,
        }

    def bound_us(self, work: Work, slots: float | None = None) -> float:
        """Return the lower bound in microseconds: the largest of those by each resource."""
        return max(limit for limit in self.limits_us(work, slots).values() if limit is not None)


MACHINES = {"h200": Machine("NVIDIA H200, data sheet", 90, 4.3e12, 790e12, 132, 1.98e9)}


def described(name: str, dtype: torch.dtype) -> Machine:
    """Return the data sheet of a GPU; float32 products, as TF32, have half the throughput."""
    machine = MACHINES[name]
    return machine._replace(flops=machine.flops / 2) if dtype == torch.float32 else machine


def measured(device: torch.device, dtype: torch.dtype, *, clock_hz: float | None = None) -> Machine:
    """Measure bandwidth by a copy and throughput by a large product; query the driver for the rest.

    Args:
        device: The GPU.
        dtype: Of the product.
        clock_hz: Maximum clock of the multiprocessors; None to query nvidia-smi.

    Raises:
        MeasureError: If nvidia-smi does not report the clock.
    """
    about = torch.cuda.get_device_properties(device)
    peaks = Roofline(device, [dtype])
    times = interleave(peaks.runs(), rounds=9, warmup=2, device=device)
    return Machine(
        name=device_name(device),
        arch=10 * about.major + about.minor,
        bytes=peaks.bytes_per_s(times),
        flops=peaks.flops_per_s(times, dtype),
        multiprocessors=about.multi_processor_count,
        clock_hz=max_clock_hz(device) if clock_hz is None else clock_hz,
    )


def max_clock_hz(device: torch.device) -> float:
    """Query the driver for the maximum clock of the multiprocessors.

    Raises:
        MeasureError: If it does not report one.
    """
    command = ("nvidia-smi", "--query-gpu=uuid,clocks.max.sm", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MeasureError(f"nvidia-smi does not run ({error}), expected it to") from error
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    lines = [line.split(", ") for line in done.stdout.splitlines()]
    clocks = [line[-1] for line in lines if uuid in line[0]] or [line[-1] for line in lines]
    if done.returncode or len(set(clocks)) != 1 or not clocks[0].isdigit():
        output = (done.stdout + done.stderr).strip()
        raise MeasureError(f"clocks.max.sm is {output!r}, expected a number of MHz for this GPU")
    return 1e6 * int(clocks[0])


def main(words: list[str]) -> None:
    """Compare kernels and a training step with their roofline bounds on this GPU."""
    parser = Parser("benchmarks/roofline.py", description=main.__doc__, allow_abbrev=False)
    add_flags(parser, "batch rounds warmup device dtype vim plan")
    parser.add_argument("--machine", choices=MACHINES, default="h200", help="without a GPU")
    parser.add_argument("--clock-mhz", type=float, metavar="N", help="nvidia-smi's by default")
    parser.add_argument("--aot", type=Path, default=TABLE, metavar="FILE", help="of aot.py")
    measure(roofline, vars(parser.parse_args(words)))


def roofline(
    *,
    model: str = "vim_tiny",
    batch: int = 128,
    plan: str = "none",
    rounds: int = 9,
    warmup: int = 2,
    device: torch.device,
    dtype: torch.dtype | None = None,
    machine: str = "h200",
    clock_mhz: float | None = None,
    aot: Path | None = None,
) -> Report:
    """Compare kernels and a whole step with their lower bounds; on a CPU, compute those alone.

    Args:
        model: Whose block and step.
        batch: Sequences.
        plan: Which layers fuse how many tokens, for the step.
        rounds: Timings of each kernel, at least 1.
        warmup: Rounds before those.
        device: A GPU to measure, or a CPU for the bounds alone.
        dtype: Of the tokens; bfloat16 by default.
        machine: The GPU of the bounds if there is none to measure.
        clock_mhz: Maximum clock of the GPU's multiprocessors; None to query nvidia-smi.
        aot: Table written by `aot.py`; None to leave instructions out.

    Returns:
        A row for every kernel of a block, and one for the step.

    Raises:
        ValueError: If a number is too small, or the plan cannot be carried out.
        MeasureError: If the clock is unknown.
    """
    dtype = training_dtype(torch.device("cuda")) if dtype is None else dtype
    positive(batch=batch)
    gpu = device.type == "cuda"
    clock_hz = None if clock_mhz is None else 1e6 * clock_mhz
    with determinism_settings(deterministic=False, matmul_precision="high"):
        here = measured(device, dtype, clock_hz=clock_hz) if gpu else described(machine, dtype)
    net = cast(Vim, Candidate(model, plan).network(torch.device("meta")))
    shape = Shape.of(net, batch=batch, itemsize=dtype.itemsize)
    slots, skipped = issue_slots(aot, here.arch, dtype, shape.state)
    works = kernel_work(shape) | {"merging": merging_work(shape, MERGED)} | product_work(shape)
    times: dict[str, list[float]] = {}
    if gpu:
        how: dict[str, Any] = dict(device=device, dtype=dtype, rounds=rounds, warmup=warmup)
        times = kernel_times(model, plan, shape, **how)

    def row(name: str, least: float, limits: Mapping[str, float | None]) -> Row:
        known = {limit: us for limit, us in limits.items() if us is not None}
        bound = max(known, key=lambda limit: known[limit], default="").removesuffix("_us")
        time_us = 1000 * spread(times[name])["median_ms"] if name in times else None
        over = None if time_us is None else time_us / least
        own = dict(kernel=name, **limits, slots=slots.get(name), bound_by=bound)
        return own | dict(bound_us=least, time_us=time_us, time_over_bound=over)

    rows = [
        row(name, here.bound_us(work, slots.get(name)), here.limits_us(work, slots.get(name)))
        for name, work in works.items()
    ]
    rows.append(row(STEP, step_us(net, shape, here, slots), dict.fromkeys(LIMITS)))
    about = dict(machine=here.name, model=model, batch=batch, plan=plan, rounds=rounds)
    rates = dict(bytes_per_s=here.bytes, flops_per_s=here.flops, clock_hz=here.clock_hz)
    return Report(
        title="roofline bounds and times" if gpu else "roofline bounds, without times",
        settings=settings(device, dtype, **about, **{n: f"{v:.3g}" for n, v in rates.items()}),
        rows=rows,
        skipped=skipped,
    )


def issue_slots(
    table: Path | None, arch: int, dtype: torch.dtype, state: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Read the warp instructions of the scans per 32 state-steps, the minimum over specializations.

    Returns:
        The numbers by kernel, and why one is missing.
    """
    if table is None or not table.is_file():
        return {}, {"instructions": f"there is no {table or 'table of compiled kernels'}"}
    wanted = {POINTERS[dtype], f"N{state}"}
    slots: dict[str, float] = {}
    skipped = {}
    for kernel in COUNTED:
        forms = [
            row.slots
            for row in read(table).rows
            if row.arch == arch and row.slots is not None and _is(row.name, kernel, wanted)
        ]
        if forms:
            slots[kernel] = min(forms)
        else:
            reason = f"{table} has none for {dtype_name(dtype)}, sm_{arch}"
            skipped[f"instructions of {kernel}"] = reason
    return slots, skipped


def _is(name: str, kernel: str, wanted: Iterable[str]) -> bool:
    """Whether a specialization is of this kernel, with all wanted words in its name."""
    words = {word.lstrip("*") for word in name.split()}
    return any(word.strip("_").startswith(kernel) for word in words) and words.issuperset(wanted)


def step_us(
    net: Vim, shape: Shape, machine: Machine, slots: Mapping[str, float] | None = None
) -> float:
    """Return the lower bound of a training step in microseconds, without embedding and head.

    The backward pass of a block recomputes the convolution and the gate.

    Args:
        net: The model, whose schedule gives the tokens of each block.
        shape: Sizes of its first block.
        machine: The GPU.
        slots: Warp instructions of kernels per 32 state-steps.
    """
    known = slots or {}
    total = 1e6 * ADAMW * sum(p.numel() for p in net.parameters()) / machine.bytes
    length = net.schedule.start
    for count, left in zip(net.schedule.counts, net.schedule.lengths, strict=True):
        before, after = shape._replace(length=length), shape._replace(length=left)
        if count:
            total += machine.bound_us(merging_work(before, count))
        norms = {n: work for n, work in kernel_work(before).items() if n.startswith("norm")}
        for name, work in (kernel_work(after) | product_work(after) | norms).items():
            times = 2 if name in ("conv_forward", "gate_forward") else 1
            total += times * machine.bound_us(work, known.get(name))
        length = left
    return total


def kernel_times(
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
    sizes = shape.batch, shape.length, shape.inner, shape.state
    with determinism_settings(deterministic=False, matmul_precision="high"):
        calls = Calls(Inputs.draw(*sizes, device=device, dtype=dtype), dim=shape.dim)
        runs: dict[str, Run] = {n: captured(getattr(calls, n)) for n in kernel_work(shape)}
        runs["merging"] = captured(Merging(training(some, **options), layers=1).run)
        runs[STEP] = training(whole, **options).run
        return interleave(runs, rounds=rounds, warmup=warmup, device=device)


if __name__ == "__main__":
    raise SystemExit(guarded(main, sys.argv[1:]))
