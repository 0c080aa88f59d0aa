"""Where a run happens: its processes, its device, its precision and its lines on the console.

`torchrun` and `python -m torch.distributed.launch --use_env` tell each process its place in the
environment (RANK, WORLD_SIZE, LOCAL_RANK); without them a run is one process.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

_TIMEOUT = timedelta(minutes=10)  # after which a process that waits for a lost one gives up
_PR_SET_PDEATHSIG = 1  # of prctl(2)

# Groups of processes that this one has left.  Whoever lets go of a group last waits for its
# threads, which may wait for Python's lock.  This list lets go of both; a wrapped model, which
# lives longer than a run that fails, would let go of the group alone, and wait for ever.
_left: list[Any] = []
atexit.register(_left.clear)


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model together.

    Attributes:
        rank: Number of this process, 0 <= rank < world.
        world: Number of processes.
        device: Where this process computes.
        talk: The group that sends what lies in ordinary memory; None for the default one.
    """

    rank: int
    world: int
    device: torch.device
    talk: Any = None

    @property
    def main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum `values` over the processes, in place; every process gets the sum."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """Return the largest value of all processes, without waiting for the device."""
        if self.world == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.talk)
        return int(shared)

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gives, plain data, by rank."""
        found = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value, group=self.talk)
        return found

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model` so that its gradients are averaged over the processes."""
        if self.world == 1:
            return model
        on = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=on)


@contextmanager
def processes(device: str | None) -> Iterator[Processes]:
    """Join the other processes of this run, and leave them at the end.

    Args:
        device: `cpu`, `cuda`, `cuda:N`, or None for a GPU if there is one.

    Raises:
        ValueError: If the device is not there.
    """
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if "RANK" in os.environ:
        end_with_parent()
    place = _device(device, _number("LOCAL_RANK", 0))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    talk = None
    if world > 1:
        gpu = place if place.type == "cuda" else None
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=_meeting_place(),
            rank=rank,
            world_size=world,
            timeout=_TIMEOUT,
            device_id=gpu,
        )
        talk = dist.new_group(backend="gloo", timeout=_TIMEOUT) if gpu else None
    try:
        yield Processes(rank, world, place, talk)
    finally:
        if world > 1:
            _left.extend((dist.group.WORLD, talk))
            dist.destroy_process_group()


def _meeting_place() -> dist.PrefixStore:
    """Return the store that a launcher keeps, for this attempt of its processes alone.

    A launcher that starts its processes again keeps what those before have left there: without a
    prefix the new ones look for addresses of processes that are gone, and wait for ever.  Launchers
    of several machines count attempts each for itself, so there is no prefix for those.
    """
    store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return dist.PrefixStore(f"fambav/{attempt}", store)


def end_with_parent() -> None:
    """Let this process be killed when the one that started it dies, on Linux.

    A launcher that is killed cannot end its processes; they would go on without it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r} in the environment, expected a number")
    return int(text)


def _device(name: str | None, local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if name == "cpu" or (name is None and count == 0):
        return torch.device("cpu")
    place = torch.device(name or "cuda")
    index = local_rank if place.index is None else place.index
    if index >= count:
        hint = "use --device cpu" if count == 0 else "start fewer processes on this machine"
        found = f"a device below {count}" if count else "cpu: there is no CUDA device here"
        raise ValueError(f"device is cuda:{index}, expected {found}; {hint}")
    return torch.device("cuda", index)


@contextmanager
def numerics(
    *, deterministic: bool, matmul_precision: str, threads: int | None = None
) -> Iterator[None]:
    """Set how torch computes, and put it back at the end.

    Args:
        deterministic: Use deterministic algorithms only; an operation that has none raises.
        matmul_precision: Of float32 products: "high" may use TF32 on a GPU, "highest" may not.
        threads: Of this process, at least 1; None for as many as torch takes.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    threads_before = torch.get_num_threads()
    torch.set_float32_matmul_precision(matmul_precision)
    torch.set_num_threads(threads_before if threads is None else threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(mode=deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.set_num_threads(threads_before)


class Precision:
    """The number format of the forward pass, and the loss scale that fp16 needs.

    Args:
        device: Where the model runs.
        dtype: bfloat16 or float16 to compute products in; None for the weights' own.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device = device
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def name(self) -> str:
        """Short name of the format, as in a log."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def autocast(self, *, cached: bool = True) -> torch.autocast:
        """Return a context for the forward pass.

        Args:
            cached: Keep a converted weight until the end, instead of converting it at each use.
        """
        enabled = self.dtype is not None
        kind = self.device.type
        return torch.autocast(kind, dtype=self.dtype, enabled=enabled, cache_enabled=cached)


class Console:
    """Lines for whoever watches: a bar on a terminal, plain lines elsewhere, nothing if silent."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Write one line, or several."""
        if not self._silent:
            self._close()
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def step(self, label: str, done: int, total: int, text: str) -> None:
        """Tell that `done` of `total` steps of `label` are done; `text` says how it goes."""
        if self._silent:
            return
        if not sys.stdout.isatty():
            self.say(f"{label} [{done}/{total}] {text}")
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc=label, file=sys.stdout, leave=False)
        self._bar.n = done
        self._bar.set_postfix_str(text)
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
