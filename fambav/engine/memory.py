"""Peak memory, each figure with its name, since a GPU and a CPU are measured by different means."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import profile

MIB = 2**20


class Peak(NamedTuple):
    """A peak of memory.

    Attributes:
        mib: The figure, in MiB.
        kind: What it counts: "cuda allocated", "cuda reserved", "saved for backward", or "saved
            for backward outside checkpointed blocks".
    """

    mib: float
    kind: str


class Saved:
    """Count the bytes that autograd keeps for the backward pass.

    Exact: every distinct storage that is saved somewhere counts once, from when the first node
    saves it until the last one lets go.  Parameters do not count, since they are there anyway; nor
    do the inputs that checkpointed blocks hold, and what those compute again: autograd's hooks do
    not see either.

    Args:
        ignored: Parameters, and whatever else lives beyond the step.
    """

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._holders: Counter[int] = Counter()
        self._bytes = 0
        self.peak_bytes = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is saved by the forward passes inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self._ignored:
            return _Held(tensor, None, place)
        self._holders[place] += 1
        if self._holders[place] == 1:
            self._bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        return _Held(tensor, self, place)

    def release(self, tensor: Tensor, place: int) -> None:
        """Forget one holder of the storage at `place`."""
        self._holders[place] -= 1
        if self._holders[place] == 0:
            self._bytes -= tensor.untyped_storage().nbytes()


class _Held:
    """A saved tensor that tells when it is let go."""

    def __init__(self, tensor: Tensor, counter: Saved | None, place: int) -> None:
        self.tensor = tensor.detach()  # an output that kept its own node alive would never be freed
        self._counter = counter
        self._place = place

    def __del__(self) -> None:
        if self._counter is not None:
            self._counter.release(self.tensor, self._place)


def _unpack(held: _Held) -> Tensor:
    return held.tensor


def allocated_peak(run: Callable[[], object]) -> int:
    """Return the most bytes that PyTorch's CPU allocator holds at once for a run.

    Counted from every allocation and release that the profiler is told of; what was there before
    counts nothing.
    """
    now = peak = 0
    with profile(profile_memory=True) as watched:
        run()
    events = (e for e in watched.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def resident_mib() -> float:
    """Return the largest resident size that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


class Meter:
    """The peak memory of one epoch on one device.

    On a GPU, the bytes allocated, or where CUDA graphs hold memory that is allocated only while
    they are recorded, the bytes reserved; on a CPU, the bytes saved for backward in one update, the
    first, since all updates are alike.

    Args:
        device: Where the model computes.
        parameters: The model's parameters.
        replayed: Whether updates are CUDA graphs.
        checkpointed: Whether blocks keep only their inputs, which the figure then leaves out on a
            CPU and says so.
    """

    def __init__(
        self,
        device: torch.device,
        parameters: Iterable[Tensor],
        *,
        replayed: bool = False,
        checkpointed: bool = False,
    ) -> None:
        self._device, self._replayed = device, replayed
        self._kind = "saved for backward" + " outside checkpointed blocks" * checkpointed
        self._parameters = list(parameters)
        self._saved = Saved(())

    @contextmanager
    def first_update(self) -> Iterator[None]:
        """Measure the update inside the block, the first of an epoch."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
        else:
            self._saved = Saved(self._parameters)
            with self._saved.watch():
                yield

    def peak(self) -> Peak:
        """Return the peak since the last first update."""
        if self._device.type == "cuda" and self._replayed:
            return Peak(torch.cuda.max_memory_reserved(self._device) / MIB, "cuda reserved")
        if self._device.type == "cuda":
            return Peak(torch.cuda.max_memory_allocated(self._device) / MIB, "cuda allocated")
        return Peak(self._saved.peak_bytes / MIB, self._kind)
