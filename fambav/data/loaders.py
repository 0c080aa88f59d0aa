"""Batches of tensors, the same whatever the number of workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from fambav.data.sampling import Key, TrainBatches
from fambav.data.transforms import Transform
from fambav.data.types import DataError, Samples
from fambav.seeding import seed_cpu

Batch = tuple[Tensor, Tensor]
Finish = Callable[[Any], Batch]
PATIENCE = 600  # seconds without a batch after which a loader process is given up
_MAX_CORRUPT = 0.01  # share of a set
_LISTED = 8  # samples that an error names
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_POLL = 1.0  # seconds between checks of the main process; torch's own miss one that died early


class SkippedError(DataError):
    """A corrupt sample of an evaluation that skips such samples."""


class SkipCorrupt:
    """Samples of which a few may be corrupt.

    They are counted in shared memory, over all loader processes.

    Args:
        samples: Samples that raise a DataError where they cannot be read.
        replacing: Whether the next readable sample replaces a corrupt one, as in training, or none
            does, as in evaluation.
    """

    def __init__(self, samples: Samples, *, replacing: bool) -> None:
        self.samples, self.replacing = samples, replacing
        self._corrupt = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return one input and its target.

        Raises:
            SkippedError: If it is corrupt and not to be replaced.
            DataError: If more than one in a hundred are corrupt.
        """
        while True:
            try:
                return self.samples[index]
            except DataError as error:
                self._corrupt[index] = 1
                if self.count() > _MAX_CORRUPT * len(self):
                    raise DataError(
                        f"{self.count()} of {len(self)} samples cannot be read, expected at most "
                        f"{100 * _MAX_CORRUPT:g}% with --on-bad-image skip; the last: {error}"
                    ) from None
                if not self.replacing:
                    raise SkippedError(str(error)) from error
                index = (index + 1) % len(self)

    def is_corrupt(self, index: int) -> bool:
        """Whether a sample turned out to be corrupt so far."""
        return bool(self._corrupt[index])

    def count(self) -> int:
        """Return the number of samples that turned out to be corrupt so far."""
        return int(self._corrupt.sum())


class Augmented(Dataset[tuple[Any, int]]):
    """Samples by (epoch, position, index), each augmented by draws of its own.

    Reading a sample reseeds the global CPU generators of the process that reads it.

    Args:
        samples: What to read from.
        transform: Makes a tensor, or sampled parameters, of an image; may draw from any global
            generator of the CPU.
        seed: Seed of the run.
    """

    def __init__(self, samples: Samples, transform: Callable[..., Any], *, seed: int) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __getitem__(self, name: Key) -> tuple[Any, int]:
        epoch, position, index = name
        image, target = self.samples[index]
        seed_cpu(self.seed, "augment", epoch, position)
        return _transformed(self.transform, image, target, index)


class Transformed(Dataset[tuple[Tensor, int] | None]):
    """Samples by index, as tensors; None for one that is skipped.

    Args:
        samples: What to read from.
        transform: Makes a tensor of an image, without drawing.
    """

    def __init__(self, samples: Samples, transform: Transform) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        try:
            image, target = self.samples[index]
        except SkippedError:
            return None
        return _transformed(self.transform, image, target, index)


def _transformed(
    transform: Callable[..., Any], image: Any, target: Any, index: int
) -> tuple[Any, Any]:
    """Return input and target; a transform with `paired` makes both, others the input alone."""
    try:
        if getattr(transform, "paired", False):
            made: tuple[Any, Any] = transform(image, target)
            return made
        return transform(image), target
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        kind, size = type(error).__name__, "x".join(map(str, image.size))
        raise DataError(
            f"sample {index} ({image.mode}, {size} pixels) cannot be augmented: {kind}: {error}"
        ) from error


def _collate_readable(
    samples: list[tuple[Tensor, int] | None], *, collate: Callable[[Any], Any]
) -> Any:
    """Return a batch of the samples that are not skipped; it may be empty."""
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return collate(readable)


class Batches:
    """An iterable of (images, labels) whose errors are one sentence.

    Args:
        loader: Reads the batches.
        samples: What it reads from.
        finish: Makes (images, labels) of what the loader yields, if it does not yield them.
    """

    def __init__(
        self, loader: DataLoader[Any], samples: Any, *, finish: Finish | None = None
    ) -> None:
        self.loader, self.samples, self._finish = loader, samples, finish
        self._done = 0

    def skipped(self) -> int:
        """Return the number of samples that could not be read so far."""
        return self.samples.count() if isinstance(self.samples, SkipCorrupt) else 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (batch, 3, height, width), float32, and labels (batch,), int64."""
        yield from self._read() if self._finish is None else map(self._finish, self._read())

    def _read(self) -> Iterator[Any]:
        """Yield what the loader does.

        Raises:
            DataError: If it cannot read on.
        """
        try:
            for batch in self._started():
                yield batch
                self._done += 1
            return
        except DataError as error:
            # A worker sends its error with a traceback as text; the message is the last line.
            name = f"{DataError.__module__}.{DataError.__qualname__}: "
            message = str(error).rstrip().rsplit("\n", 1)[-1].removeprefix(name)
            error.__traceback__ = None  # it keeps the workers, which then need seconds to stop
        except (RuntimeError, OSError, EOFError) as error:
            message = self._failure(error)
            error.__traceback__ = None
        raise DataError(message)

    def _started(self) -> Iterator[Any]:
        with signals_blocked():
            return iter(self.loader)

    def _failure(self, error: Exception) -> str:
        """Return what is known of a loader process that raised, died or hangs."""
        if "Original Traceback" in str(error):
            reason = str(error).rstrip().rsplit("\n", 1)[-1]
            return f"a sample cannot be read {self._where()}: {reason}"
        reason = str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
        return (
            f"a loader process ended or hangs {self._where()} ({reason}), expected a batch; was it "
            "killed for memory? fewer --num_workers or more shared memory may help"
        )

    def _where(self) -> str:
        return f"at batch {self._done}"


class EvalBatchesLoader(Batches):
    """The samples of one process, each once and in order."""

    def indices(self) -> list[int]:
        """Return the indices of the samples that were read; to be called after a pass."""
        wanted, samples = cast("Subset[Any]", self.loader.dataset).indices, self.samples
        if not isinstance(samples, SkipCorrupt):
            return list(wanted)
        return [index for index in wanted if not samples.is_corrupt(index)]


class TrainBatchesLoader(Batches):
    """The micro-batches of a run, from one update to the end, in one stream.

    Attributes:
        updates_per_epoch: Updates to an epoch.
    """

    def __init__(
        self, loader: DataLoader[Any], samples: Any, *, order: TrainBatches, finish: Finish | None
    ) -> None:
        super().__init__(loader, samples, finish=finish)
        self._order = order
        self.updates_per_epoch = order.updates_per_epoch

    def indices(self, update: int) -> dict[str, Any]:
        """Return the sample indices of one update, by process and by micro-batch."""
        return {"samples": self._order.indices(update)}

    def _where(self) -> str:
        order = self._order
        update, micro = divmod(self._done, order.accum)
        update += order.updates.start
        samples = order.indices(update)[order.rank][micro]
        more = ", ..." if len(samples) > _LISTED else ""
        return f"before update {update} (samples {', '.join(map(str, samples[:_LISTED]))}{more})"


def data_loader(dataset: Dataset[Any], *, workers: int, **options: Any) -> DataLoader[Any]:
    """Return a DataLoader that draws nothing from the global generator.

    Args:
        dataset: What to read from.
        workers: Processes that read ahead; 0 reads in this one.
        options: Other arguments of DataLoader.

    Raises:
        ValueError: If processes import the script anew, and cannot.
    """
    if workers:
        _try_start(multiprocessing.get_context().get_start_method())
    return DataLoader(
        dataset,
        num_workers=workers,
        timeout=PATIENCE if workers else 0,
        worker_init_fn=worker_init,
        generator=torch.Generator(),
        **options,
    )


@cache
def _try_start(method: str) -> None:
    """Start a process that does nothing, where processes are not forked.

    One that ends while it imports the script would never be noticed with a data set to be sent to
    it: multiprocessing waits for what it has written to be read.
    """
    if method == "fork":
        return
    process = multiprocessing.Process()
    try:
        process.start()
        process.join()
        started = process.exitcode == 0
    except (OSError, EOFError):  # the fork server has ended
        started = False
    if not started:
        raise ValueError(
            f"a loader process cannot import the script, as the start method {method!r} does, "
            'expected all that the script runs under if __name__ == "__main__":'
        )


def train_loader(
    samples: Samples,
    transform: Callable[..., Any],
    *,
    seed: int,
    workers: int = 0,
    pin_memory: bool = False,
    collate_fn: Callable[[Any], Any] | None = None,
    finish: Finish | None = None,
    **order: Any,
) -> TrainBatchesLoader:
    """Return the micro-batches that one process trains on, from `start_update` to the last.

    The stream runs through all epochs, so workers start once; batch j belongs to update
    start_update + j // accum.  Without workers, reading a batch reseeds the global CPU generators
    of the process: seed what is drawn in a step after its batch has arrived.

    Args:
        samples: Training samples.
        transform: Makes a tensor of an image.
        seed: Seed of the run.
        workers: Processes that read ahead; 0 reads in this one.
        pin_memory: Whether batches go through page-locked memory, for a GPU.
        collate_fn: Makes a batch of samples, in the process that reads them.
        finish: Makes (images, labels) of a batch, in this process.
        order: Other arguments of `TrainBatches`: batch_size, epochs and the share of this process.

    Returns:
        Batches with `updates_per_epoch`.

    Raises:
        ValueError: If an epoch has not enough samples for one update.
    """
    batches = TrainBatches(len(samples), seed=seed, **order)
    loader = data_loader(
        Augmented(samples, transform, seed=seed),
        workers=workers,
        batch_sampler=batches,
        pin_memory=pin_memory,
        collate_fn=collate_fn,
    )
    return TrainBatchesLoader(loader, samples, order=batches, finish=finish)


def eval_loader(
    samples: Samples,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    collate_fn: Callable[[Any], Any] | None = None,
) -> EvalBatchesLoader:
    """Return every sample once over all processes, without padding.

    Args:
        samples: Samples to evaluate.
        transform: Makes a tensor of an image, without drawing.
        batch_size: Samples in a batch of one process; the last may be smaller.
        rank: Number of this process, which gets every world-th sample.
        world: Number of processes.
        workers: Processes that read ahead; 0 reads in this one.
        pin_memory: Whether batches go through page-locked memory, for a GPU.
        collate_fn: Makes a batch of samples that were read.

    Returns:
        Batches in the order of the samples; they may be read any number of times.
    """
    loader = data_loader(
        Subset(Transformed(samples, transform), range(rank, len(samples), world)),
        workers=workers,
        batch_size=batch_size,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        collate_fn=partial(_collate_readable, collate=collate_fn or default_collate),
    )
    return EvalBatchesLoader(loader, samples)


# Schedulers, `timeout` and Ctrl-C signal all processes of a job at once.  The main process takes
# note and ends when the state is saved; until then it needs batches, so its loader processes must
# outlast the signal.


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Start loader processes inside the block: from birth no thread of theirs takes a signal.

    A process inherits the mask of the thread that starts it.  One that blocked signals itself
    would be too late for those sent before, and for the threads that torch has started in it by
    then.  This process's own handlers are called at the end of the block: one that raises would
    leave torch's loader half made.  On Linux.
    """
    if sys.platform != "linux":
        yield
        return
    received: set[int] = set()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # another thread may still take one
    handlers = _python_handlers()
    for number in handlers:
        signal.signal(number, lambda number, _: received.add(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in received:
            signal.raise_signal(number)


def _python_handlers() -> dict[int, Any]:
    """Return this process's handlers in Python, which only the main thread can change."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    return {number: handler for number, handler in handlers.items() if callable(handler)}


def worker_init(_: int) -> None:
    """Let nothing but the main process end this loader process, by SIGTERM or by its own end."""
    main = multiprocessing.parent_process()
    if sys.platform == "linux" and main is not None:
        threading.Thread(target=_exit_with, args=(main,), daemon=True).start()


def _exit_with(main: Any) -> None:
    while main.is_alive():
        received = signal.sigtimedwait(_SIGNALS, _POLL)
        if received and received.si_signo == signal.SIGTERM and received.si_pid == main.pid:
            break
    os._exit(0)  # as torch's own handler does: another status would be an error to it
