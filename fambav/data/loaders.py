"""Batches of tensors, the same whatever the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from fambav.data.arrays import DataError, Samples
from fambav.data.sampling import Key, TrainBatches
from fambav.randomness import seed_cpu

Transform = Callable[[Image.Image], Tensor]
Batch = tuple[Tensor, Tensor]


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
        return self.transform(image), label


class Transformed(Dataset[tuple[Tensor, int]]):
    """Samples by place, as tensors.

    Args:
        samples: What to read from.
        transform: Makes a tensor of an image, without drawing.
    """

    def __init__(self, samples: Samples, transform: Transform) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        image, label = self.samples[place]
        return self.transform(image), label


class Batches:
    """An iterable of (images, labels) whose errors are one sentence.

    Args:
        loader: Reads the batches.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (batch, 3, height, width), float32, and labels (batch,), int64."""
        try:
            yield from self.loader
            return
        except DataError as error:
            # A worker sends its error with a traceback as text; the message is the last line.
            name = f"{DataError.__module__}.{DataError.__qualname__}: "
            message = str(error).rstrip().rsplit("\n", 1)[-1].removeprefix(name)
            error.__traceback__ = None  # it keeps the workers, which then need seconds to stop
        raise DataError(message)


class TrainBatchesLoader(Batches):
    """The micro-batches of a run, from one update to the end, in one stream.

    Attributes:
        updates_per_epoch: Updates to an epoch.
    """

    def __init__(self, loader: DataLoader[Any], *, updates_per_epoch: int) -> None:
        super().__init__(loader)
        self.updates_per_epoch = updates_per_epoch


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
    batches = TrainBatches(
        len(samples),
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        rank=rank,
        world=world,
        accum=accum,
        start_update=start_update,
        repeats=repeats,
    )
    loader = DataLoader(
        Augmented(samples, transform, seed=seed),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    return TrainBatchesLoader(loader, updates_per_epoch=batches.updates_per_epoch)


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
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )
    return Batches(loader)
