"""Batches of tensors, the same whatever the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from fambav.data.arrays import DataError, Samples
from fambav.data.sampling import Key, TrainBatches
from fambav.data.shield import outlast, shielded
from fambav.data.unreadable import LeftOutError, Tolerant
from fambav.seeding import seed_cpu

Transform = Callable[[Image.Image], Tensor]
Batch = tuple[Tensor, Tensor]
_SHOWN = 8  # samples that an error names
PATIENCE = 600  # seconds without a batch after which a loader process is given up


class Augmented(Dataset[tuple[Tensor, int]]):
    """Samples by (epoch, position, place), each augmented by draws of its own.

    Reading a sample reseeds the global CPU generators of the process that reads it.

    Args:
        samples: What to read from.
        transform: Makes a tensor of an image; may draw from any global generator of the CPU.
        seed: Seed of the run.
    """

    def __init__(self, samples: Samples, transform: Transform, *, seed: int) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __getitem__(self, name: Key) -> tuple[Tensor, int]:
        epoch, position, place = name
        image, label = self.samples[place]
        seed_cpu(self.seed, "augment", epoch, position)
        return _transformed(self.transform, image, place), label


class Transformed(Dataset[tuple[Tensor, int] | None]):
    """Samples by place, as tensors.

    Args:
        samples: What to read from.
        transform: Makes a tensor of an image, without drawing.
    """

    def __init__(self, samples: Samples, transform: Transform) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int] | None:
        try:
            image, label = self.samples[place]
        except LeftOutError:
            return None
        return _transformed(self.transform, image, place), label


def _transformed(transform: Transform, image: Image.Image, place: int) -> Tensor:
    try:
        return transform(image)
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        kind, size = type(error).__name__, "x".join(map(str, image.size))
        raise DataError(
            f"sample {place} ({image.mode}, {size} pixels) cannot be augmented: {kind}: {error}"
        ) from error


def _collated(samples: list[tuple[Tensor, int] | None]) -> Any:
    """A batch of the samples that are not left out; it may be empty."""
    there = [sample for sample in samples if sample is not None]
    if not there:
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return default_collate(there)


class Batches:
    """An iterable of (images, labels) whose errors are one sentence.

    Args:
        loader: Reads the batches.
        samples: What it reads from.
    """

    def __init__(self, loader: DataLoader[Any], samples: Any) -> None:
        self.loader, self.samples = loader, samples
        self._done = 0

    def left_out(self) -> int:
        """Return how many samples could not be read so far."""
        return self.samples.count() if isinstance(self.samples, Tolerant) else 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (batch, 3, height, width), float32, and labels (batch,), int64."""
        yield from self._read()

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
            message = self._lost(error)
            error.__traceback__ = None
        raise DataError(message)

    def _started(self) -> Iterator[Any]:
        with shielded():
            return iter(self.loader)

    def _lost(self, error: Exception) -> str:
        """Say what is known of a loader process that raised, is gone or hangs."""
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


class TrainBatchesLoader(Batches):
    """The micro-batches of a run, from one update to the end, in one stream.

    Attributes:
        updates_per_epoch: Updates to an epoch.
    """

    def __init__(self, loader: DataLoader[Any], samples: Any, *, order: TrainBatches) -> None:
        super().__init__(loader, samples)
        self._order = order
        self.updates_per_epoch = order.updates_per_epoch

    def places(self, update: int) -> dict[str, Any]:
        """Return the places in the set of one update, by process and by micro-batch."""
        return {"samples": self._order.places(update)}

    def _where(self) -> str:
        order = self._order
        update, micro = divmod(self._done, order.accum)
        update += order.updates.start
        samples = order.places(update)[order.rank][micro]
        shown = ", ".join(map(str, samples[:_SHOWN])) + (", ..." if len(samples) > _SHOWN else "")
        return f"before update {update} (samples {shown})"


def train_loader(
    samples: Samples,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    rank: int = 0,
    world: int = 1,
    accum: int = 1,
    start_update: int = 0,
    repeats: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> TrainBatchesLoader:
    """Return the micro-batches that one process trains on, from `start_update` to the last.

    The stream runs through all epochs, so workers start once; batch j belongs to update
    start_update + j // accum.  Without workers, reading a batch reseeds the global CPU generators
    of the process: seed what is drawn in a step after its batch has arrived.

    Args:
        samples: Training samples.
        transform: Makes a tensor of an image.
        batch_size: Samples in a micro-batch of one process.
        seed: Seed of the run.
        epochs: Epochs of the whole run.
        rank: Number of this process.
        world: Number of processes.
        accum: Micro-batches to an update.
        start_update: Updates that are done.
        repeats: How often in a row each sample comes (repeated augmentation).
        workers: Processes that read ahead; 0 reads in this one.
        pin_memory: Whether batches go through page-locked memory, for a GPU.

    Returns:
        Batches with `updates_per_epoch`.

    Raises:
        ValueError: If an epoch has not enough samples for one update.
    """
    share = dict(rank=rank, world=world, accum=accum, start_update=start_update, repeats=repeats)
    batches = TrainBatches(len(samples), batch_size=batch_size, seed=seed, epochs=epochs, **share)
    loader = DataLoader(
        Augmented(samples, transform, seed=seed),
        batch_sampler=batches,
        num_workers=workers,
        timeout=PATIENCE if workers else 0,
        worker_init_fn=outlast,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    return TrainBatchesLoader(loader, samples, order=batches)


def eval_loader(
    samples: Samples,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Batches:
    """Return every sample once over all processes, without padding.

    Args:
        samples: Samples to evaluate.
        transform: Makes a tensor of an image, without drawing.
        batch_size: Samples in a batch of one process; the last may be smaller.
        rank: Number of this process, which gets every world-th sample.
        world: Number of processes.
        workers: Processes that read ahead; 0 reads in this one.
        pin_memory: Whether batches go through page-locked memory, for a GPU.

    Returns:
        Batches in the order of the samples; they may be read any number of times.
    """
    loader = DataLoader(
        Subset(Transformed(samples, transform), range(rank, len(samples), world)),
        batch_size=batch_size,
        num_workers=workers,
        timeout=PATIENCE if workers else 0,
        worker_init_fn=outlast,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
        collate_fn=_collated,
    )
    return Batches(loader, samples)
