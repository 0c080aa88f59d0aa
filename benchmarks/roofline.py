"""Roofline model: how far kernels and steps are from what bytes and instructions allow.

    python benchmarks/roofline.py --plan upper:6:9

The least time of some work is the largest of four: bytes over the bandwidth of a copy, products
over the rate of a large one, exponentials over the units that make them, and for the scan its
instructions, as `aot.py` counted them, over what can be issued.  What fits in a GPU's cache may be
faster than its bytes.  Without a GPU the times are counted for one as it is described.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from aot import read
from kernels import Calls

from fambav.bench.candidates import EAGER, REPLAYED, Candidate
from fambav.bench.ceilings import STATE_EVERY, Ceilings
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
from fambav.bench.strategies import Merging
from fambav.bench.timing import Run, captured, interleave, spread
from fambav.cli import guarded
from fambav.commands.bench import add_flags, measure
from fambav.commands.parser import Parser
from fambav.engine.precision import determinism_settings
from fambav.layers import Block, Mamba
from fambav.models import Vim

TABLE = Path(__file__).with_name("aot.json")
WARP = 32  # lanes
SCHEDULERS = 4  # of a multiprocessor, each of which issues an instruction of a warp in a cycle
SFU_LANES = 16  # of a multiprocessor, for exponentials and logarithms
WIDE = 4  # bytes of a number of the residual stream and of the state
ADAMW = 28  # bytes for each weight: read and write weight and both moments, read the gradient
POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
COUNTED = ("scan_forward", "scan_backward")  # kernels whose instructions are
STEP = "whole step"
LIMITS = ("bytes_us", "exp_us", "issue_us", "product_us")
MERGED = 2  # tokens of the merging that is timed on its own; its bytes hardly depend on them


class Shape(NamedTuple):
    """Sizes of a block.

    Attributes:
        batch, length: Sequences and tokens of each.
        dim, inner: Width of a token outside and inside the mixer.
        state: Numbers of state for each channel.
        rank: Width of dt.
        itemsize: Bytes of a stored number.
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
    """What one kernel has to do at least.

    Attributes:
        bytes: Read and written.
        exps: Exponentials and logarithms.
        steps: State-steps, one state number of one channel at one token.
        flops: Of matrix products.
    """

    bytes: float
    exps: float = 0
    steps: float = 0
    flops: float = 0


def kernel_work(s: Shape) -> dict[str, Work]:
    """Return what the kernels of a block do that are no matrix products, each run once.

    Every tensor is read once and written once by each kernel.
    """
    channels = s.tokens * s.inner
    inner, narrow = channels * s.itemsize, s.tokens * s.dim * s.itemsize
    wide = s.tokens * s.dim * WIDE
    steps = 2 * channels * s.state
    BC = 2 * s.tokens * 2 * s.state * s.itemsize
    kept = 2 * s.batch * -(-s.length // STATE_EVERY) * s.inner * s.state * WIDE
    scale = s.tokens * WIDE
    return {
        "scan_forward": Work(6 * inner + BC + kept, steps + 4 * channels, steps),
        "scan_backward": Work(9 * inner + 2 * BC + kept, steps + 6 * channels, steps),
        "conv_forward": Work(3 * inner, 2 * channels),
        "conv_backward": Work(4 * inner, 2 * channels),
        "gate_forward": Work(5 * inner, channels),
        "gate_backward": Work(5 * inner, channels),
        "norm_forward": Work(2 * (narrow + wide) + scale),
        "norm_backward": Work(2 * narrow + 3 * wide + scale),
    }


def product_work(s: Shape) -> dict[str, Work]:
    """Return what the matrix products of a block do, forward and backward together."""
    inner, narrow = s.tokens * s.inner * s.itemsize, s.tokens * s.dim * s.itemsize
    rows = 2 * s.tokens * (s.rank + 2 * s.state) * s.itemsize
    dt = 2 * s.tokens * s.rank * s.itemsize

    def both(given: float, made: float, weights: float, times: int = 3) -> Work:
        """Count a product and its two gradients, and the product once more if it is not kept."""
        return Work(times * (given + made), flops=2 * times * s.tokens * weights)

    return {
        "in_proj": both(narrow, 2 * inner, 2 * s.dim * s.inner),
        "x_proj": both(2 * inner, rows, 2 * s.inner * (s.rank + 2 * s.state)),
        "dt_proj": both(dt, 2 * inner, 2 * s.rank * s.inner, times=4),
        "out_proj": both(inner, narrow, s.inner * s.dim),
    }


def merging_work(s: Shape, count: int) -> Work:
    """Return what replacing groups by their means does to both streams, forward and backward."""
    tokens = s.tokens + s.batch * (s.length - count)
    return Work(2 * tokens * s.dim * (s.itemsize + WIDE))


class Machine(NamedTuple):
    """A GPU.

    Attributes:
        name: What it is called.
        arch: Compute capability without its dot.
        bytes: That its memory moves in a second, read or written.
        flops: Of matrix products in a second.
        multiprocessors: How many there are.
        clock_hz: Their cycles in a second at most.
    """

    name: str
    arch: int
    bytes: float
    flops: float
    multiprocessors: int
    clock_hz: float

    def limits_us(self, work: Work, slots: float | None = None) -> dict[str, float | None]:
        """Return the least time in microseconds that each of a GPU's parts needs for some work.

        Args:
            work: What is to be done.
            slots: Warp instructions for 32 state-steps; None if they were not counted.
        """
        cycles = self.multiprocessors * self.clock_hz
        issued = None if slots is None else work.steps / WARP * slots / (SCHEDULERS * cycles)
        return {
            "bytes_us": 1e6 * work.bytes / self.bytes,
            "exp_us": 1e6 * work.exps / (SFU_LANES * cycles),
            "issue_us": None if issued is None else 1e6 * issued,
            "product_us": 1e6 * work.flops / self.flops,
        }

    def floor_us(self, work: Work, slots: float | None = None) -> float:
        """Return the least time in microseconds for some work: the largest of its limits."""
        return max(limit for limit in self.limits_us(work, slots).values() if limit is not None)


MACHINES = {"h200": Machine("NVIDIA H200, as described", 90, 4.3e12, 790e12, 132, 1.98e9)}


def described(name: str, dtype: torch.dtype) -> Machine:
    """Return what is told of a GPU; float32 products, as TF32, run at half the rate of narrower."""
    found = MACHINES[name]
    return found._replace(flops=found.flops / 2) if dtype == torch.float32 else found


def measured(device: torch.device, dtype: torch.dtype, *, clock_hz: float | None = None) -> Machine:
    """Measure memory by a copy and products by a large one; read the rest from the driver.

    Args:
        device: The GPU.
        dtype: Of the product.
        clock_hz: Highest clock of the multiprocessors; None to ask nvidia-smi.

    Raises:
        MeasureError: If nvidia-smi does not tell the clock.
    """
    about = torch.cuda.get_device_properties(device)
    limits = Ceilings(device, [dtype])
    times = interleave(limits.runs(), rounds=9, warmup=2, device=device)
    return Machine(
        name=device_name(device),
        arch=10 * about.major + about.minor,
        bytes=limits.bytes_per_s(times),
        flops=limits.flops_per_s(times, dtype),
        multiprocessors=about.multi_processor_count,
        clock_hz=highest_clock_hz(device) if clock_hz is None else clock_hz,
    )


def highest_clock_hz(device: torch.device) -> float:
    """Ask the driver for the highest clock of the multiprocessors.

    Raises:
        MeasureError: If it does not tell.
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
        told = (done.stdout + done.stderr).strip()
        raise MeasureError(f"clocks.max.sm is {told!r}, expected a number of MHz for this GPU")
    return 1e6 * int(clocks[0])


def main(words: list[str]) -> None:
    """Set kernels and a step beside the least time that they need on this GPU."""
    parser = Parser("benchmarks/roofline.py", description=main.__doc__, allow_abbrev=False)
    add_flags(parser, "batch rounds warmup device dtype vim plan")
    parser.add_argument("--machine", choices=MACHINES, default="h200", help="without a GPU")
    parser.add_argument("--clock-mhz", type=float, metavar="N", help="nvidia-smi is asked for it")
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
    """Compare kernels and a whole step with their least times; on a CPU, count those alone.

    Args:
        model: Whose block and step.
        batch: Sequences.
        plan: Which layers fuse how many tokens, for the step.
        rounds: How often each kernel is timed, at least 1.
        warmup: Rounds before those.
        device: A GPU to measure, or a CPU to count on.
        dtype: Of the tokens; bfloat16 by default.
        machine: The GPU that is counted for where there is none.
        clock_mhz: Highest clock of the GPU's multiprocessors; None to ask nvidia-smi.
        aot: What `aot.py` wrote; None to leave instructions out.

    Returns:
        A row for every kernel of a block, and one for the step.

    Raises:
        ValueError: If a number is too small, or the plan cannot be carried out.
        MeasureError: If nobody tells the clock.
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
        gap = None if time_us is None else time_us / least
        found = dict(kernel=name, **limits, slots=slots.get(name), bound_by=bound)
        return found | dict(floor_us=least, time_us=time_us, gap=gap)

    rows = [
        row(name, here.floor_us(work, slots.get(name)), here.limits_us(work, slots.get(name)))
        for name, work in works.items()
    ]
    rows.append(row(STEP, step_us(net, shape, here, slots), dict.fromkeys(LIMITS)))
    about = dict(machine=here.name, model=model, batch=batch, plan=plan, rounds=rounds)
    rates = dict(bytes_per_s=here.bytes, flops_per_s=here.flops, clock_hz=here.clock_hz)
    return Report(
        title="least times, and times beside them" if gpu else "least times, counted and not timed",
        settings=settings(device, dtype, **about, **{n: f"{v:.3g}" for n, v in rates.items()}),
        rows=rows,
        skipped=skipped,
    )


def issue_slots(
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
    for kernel in COUNTED:
        forms = [
            row.slots
            for row in read(table).rows
            if row.arch == arch and row.slots is not None and _is(row.name, kernel, wanted)
        ]
        if forms:
            found[kernel] = min(forms)
        else:
            told = f"{table} has none for {dtype_name(dtype)}, sm_{arch}"
            skipped[f"instructions of {kernel}"] = told
    return found, skipped


def _is(name: str, kernel: str, wanted: Iterable[str]) -> bool:
    """Whether a compiled form is one of this kernel with all wanted words in its name."""
    words = {word.lstrip("*") for word in name.split()}
    return any(word.strip("_").startswith(kernel) for word in words) and words.issuperset(wanted)


def step_us(
    net: Vim, shape: Shape, machine: Machine, slots: Mapping[str, float] | None = None
) -> float:
    """Return the least time of a training step in microseconds, without embedding and head.

    The backward pass of a block convolves again and gates again, since neither result is kept.

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
        before, after = shape._replace(length=length), shape._replace(length=left)
        if count:
            total += machine.floor_us(merging_work(before, count))
        norms = {n: work for n, work in kernel_work(before).items() if n.startswith("norm")}
        for name, work in (kernel_work(after) | product_work(after) | norms).items():
            times = 2 if name in ("conv_forward", "gate_forward") else 1
            total += times * machine.floor_us(work, known.get(name))
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
