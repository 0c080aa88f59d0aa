"""What a GPU can do at best: bytes, products, exponentials and instructions in a second."""

from __future__ import annotations

import subprocess
from typing import NamedTuple

import torch

from fambav.bench.ceilings import Ceilings
from fambav.bench.report import MeasureError, device_name
from fambav.bench.work import Work
from fambav.engine.timing import interleave

WARP = 32  # lanes
SCHEDULERS = 4  # of a multiprocessor, each of which issues an instruction of a warp in a cycle
SFU_LANES = 16  # of a multiprocessor, for exponentials and logarithms


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


DESCRIBED = {"h200": Machine("NVIDIA H200, as described", 90, 4.3e12, 790e12, 132, 1.98e9)}


def described(name: str, dtype: torch.dtype) -> Machine:
    """Return what is told of a GPU; float32 products, as TF32, run at half the rate of narrower."""
    found = DESCRIBED[name]
    return found._replace(flops=found.flops / 2) if dtype == torch.float32 else found


def measured(
    device: torch.device, dtype: torch.dtype, *, clock_hz: float | None = None, rounds: int = 9
) -> Machine:
    """Measure memory by a copy and products by a large one; read the rest from the driver.

    Args:
        device: The GPU.
        dtype: Of the product.
        clock_hz: Highest clock of the multiprocessors; None to ask nvidia-smi.
        rounds: How often each is timed.

    Raises:
        MeasureError: If nvidia-smi does not tell the clock.
    """
    about = torch.cuda.get_device_properties(device)
    limits = Ceilings(device, [dtype])
    times = interleave(limits.runs(), rounds=rounds, warmup=2, device=device)
    return Machine(
        name=device_name(device),
        arch=10 * about.major + about.minor,
        bytes=limits.bytes_per_s(times),
        flops=limits.flops_per_s(times, dtype),
        multiprocessors=about.multi_processor_count,
        clock_hz=_clock_hz(device) if clock_hz is None else clock_hz,
    )


def _clock_hz(device: torch.device) -> float:
    """Ask the driver for the highest clock of the multiprocessors."""
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
