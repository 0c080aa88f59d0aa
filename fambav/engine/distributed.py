"""The processes of a run and the device of each.

A launcher states the place of each process in its environment, see `fambav.launcher`; without one a
run is one process.
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

from fambav import launcher

_TIMEOUT = timedelta(minutes=10)  # after which a process that waits for a lost one gives up
_PR_SET_PDEATHSIG = 1  # of prctl(2)

# Groups that were left.  Dropping the last reference to one joins its threads, which may wait for
# the GIL; a wrapped model, which outlives a run that fails, would drop the group alone: a deadlock.
_kept_groups: list[Any] = []
atexit.register(_kept_groups.clear)


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model together.

    Attributes:
        rank: Number of this process, 0 <= rank < world.
        world: Number of processes.
        device: Where this process computes.
        gloo: Side group for tensors in CPU memory and for objects; None for the default group.
    """

    rank: int
    world: int
    device: torch.device
    gloo: Any = None

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
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.gloo)
        return int(shared)

    def gather(self, value: Any) -> list[Any]:
        """Return the plain data that each process passes, by rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.gloo)
        return values

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
        LauncherError: If variables of the launcher are missing or wrong.
        ValueError: If the device is not there.
    """
    rank, world, local_rank = launcher.place(os.environ)
    if "RANK" in os.environ:
        end_with_parent()
    own = _device(device, local_rank)
    gpu = own if own.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    gloo = None
    if world > 1:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=_store(),
            rank=rank,
            world_size=world,
            timeout=_TIMEOUT,
            device_id=gpu,
        )
        gloo = dist.new_group(backend="gloo", timeout=_TIMEOUT) if gpu else None
    try:
        yield Processes(rank, world, own, gloo)
    finally:
        if world > 1:
            _kept_groups.extend((dist.group.WORLD, gloo))
            dist.destroy_process_group()


def _store() -> dist.PrefixStore:
    """Return the launcher's key-value store, with a prefix for each restart.

    A launcher that restarts its processes keeps the keys of those before: without a prefix the new
    ones connect to addresses of processes that are gone, and wait for ever.  Launchers of several
    machines count restarts each for itself, so there is no prefix for those.

    Raises:
        LauncherError: If the processes cannot meet where the environment says.
    """
    host, port = launcher.rendezvous_address(os.environ)
    try:
        store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
    except (dist.DistError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        expected = (
            "a free port" if "EADDRINUSE" in reason else f"one where rank 0 listens on {host}"
        )
        raise launcher.LauncherError(
            f"MASTER_PORT is {port} in the environment, expected {expected}; {reason}"
        ) from None
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return dist.PrefixStore(f"fambav/{attempt}", store)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, on Linux.

    A launcher that is killed cannot end its processes; they would run on without it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _device(name: str | None, local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if name == "cpu" or (name is None and count == 0):
        return torch.device("cpu")
    index = torch.device(name or "cuda").index
    index = local_rank if index is None else index
    if index >= count:
        hint = "use --device cpu" if count == 0 else "start fewer processes on this machine"
        wanted = f"a device below {count}" if count else "cpu: there is no CUDA device here"
        raise ValueError(f"device is cuda:{index}, expected {wanted}; {hint}")
    return torch.device("cuda", index)
