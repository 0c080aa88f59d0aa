"""Peak memory, each figure with its kind, since a GPU and a CPU are measured by different means."""

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


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass, by saved-tensor hooks.

    Exact: every distinct storage counts once, from when the first node saves it until the last one
    releases it.  Parameters do not count, since they are there anyway; nor do the inputs that
    checkpointed blocks hold, and what those recompute: the hooks see neither.

    Args:
        ignored: Parameters, and other tensors that outlive the step.
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

    def _pack(self, tensor: Tensor) -> _SavedTensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._ignored:
            return _SavedTensor(tensor, None)
        self._holders[address] += 1
        if self._holders[address] == 1:
            self._bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        return _SavedTensor(tensor, self)

    def release(self, tensor: Tensor) -> None:
        """Remove one holder of the storage of a tensor."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        self._holders[address] -= 1
        if self._holders[address] == 0:
            self._bytes -= storage.nbytes()


class _SavedTensor:
    """What autograd holds in the place of a tensor; its end is that of the tensor."""

    def __init__(self, tensor: Tensor, counter: SavedBytes | None) -> None:
        self.tensor = tensor.detach()  # an output that kept its own node alive would never be freed
        self._counter = counter

    def __del__(self) -> None:
        if self._counter is not None:
            self._counter.release(self.tensor)


def _unpack(saved: _SavedTensor) -> Tensor:
    return saved.tensor


def allocated_peak(run: Callable[[], object]) -> int:
    """Return the most bytes that PyTorch's CPU allocator holds at once for a run.

    Counted from every allocation and release in the profiler's events, and from nothing before the
    run.
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


class PeakMemory:
    """The peak memory of one epoch on one device.

    On a GPU, the bytes allocated, or with CUDA graphs, whose memory is allocated only during their
    capture, the bytes reserved; on a CPU, the bytes saved for backward in one update, the first,
    since all updates are alike.

    Args:
        device: Where the model computes.
        parameters: The model's parameters.
        replayed: Whether updates are CUDA graphs.
        checkpointed: Whether blocks keep only their inputs, which the figure on a CPU leaves out;
            its kind then says so.
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
        self._saved = SavedBytes(())

    @contextmanager
    def first_update(self) -> Iterator[None]:
        """Measure the update inside the block, the first of an epoch."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
        else:
            self._saved = SavedBytes(self._parameters)
            with self._saved.watch():
                yield

    def peak(self) -> Peak:
        """Return the peak since the last first update."""
        if self._device.type == "cuda" and self._replayed:
            return Peak(torch.cuda.max_memory_reserved(self._device) / MIB, "cuda reserved")
        if self._device.type == "cuda":
            return Peak(torch.cuda.max_memory_allocated(self._device) / MIB, "cuda allocated")
        return Peak(self._saved.peak_bytes / MIB, self._kind)
