"""Images that live on the training device, augmented there in batches.

    keys -> what a transform would draw (CPU)  -> orders -> gather, resize, steps, normalise, erase

The result is what the transform itself makes of the same images, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fambav.data.arrays import ArraySet, Samples
from fambav.data.batch_colours import COLOURS, Operation
from fambav.data.batch_geometry import pieces, resize, shift, warp
from fambav.data.loaders import PATIENCE, Batch, TrainBatchesLoader
from fambav.data.recording import KIT, Draws, Orders, Recipe, Recording, Resizing, collate
from fambav.data.sampling import TrainBatches
from fambav.data.shield import outlast

OPERATIONS: dict[str, Operation] = {
    **COLOURS,
    "FLIP_LEFT_RIGHT": lambda images, _: images.flip(3),
    "ROTATE_90": lambda images, _: images.rot90(1, (2, 3)),
    "ROTATE_180": lambda images, _: images.rot90(2, (2, 3)),
    "ROTATE_270": lambda images, _: images.rot90(3, (2, 3)),
    "Shift": partial(shift, mirrored=False),
    "ShiftMirrored": partial(shift, mirrored=True),
    **{
        f"{name}{kind}": partial(warp, axes=axes, cubic=kind == "Cubic")
        for name, axes in (("Across", "across"), ("Down", "down"), ("Turn", "both"))
        for kind in ("Cubic", "Linear")
    },
}


class Resident:
    """Images and labels of a set on a device.

    Attributes:
        images: (count, 3, height, width), uint8.
        labels: (count,), int64.

    Args:
        samples: A set held in memory.
        device: Where to.

    Raises:
        ValueError: If the set is not held in memory.
    """

    def __init__(self, samples: Samples, *, device: torch.device) -> None:
        if not isinstance(samples, ArraySet):
            raise ValueError(
                f"samples are read one by one from a {type(samples).__name__}, expected a set "
                "held in memory, such as DIGITS, SHAPES100 or CIFAR, with --gpu-augment"
            )
        images = torch.from_numpy(samples.images).permute(0, 3, 1, 2)
        self.images = images.contiguous().to(device)
        self.labels = torch.from_numpy(samples.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the set is."""
        return self.images.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of every image, in pixels."""
        return self.images.shape[2], self.images.shape[3]


class Scales(NamedTuple):
    """What brings levels of 8 bits to a normal scale, on the device.

    A GPU divides by a tensor truly, and by a number less exactly.

    Attributes:
        levels: 255.
        mean: Of each channel in [0, 1], (3, 1, 1).
        std: Likewise.
    """

    levels: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, step: Any, device: torch.device) -> Scales:
        """Return those of torchvision's `Normalize`."""
        mean, std = (
            torch.as_tensor(each, dtype=torch.float32, device=device).view(3, 1, 1)
            for each in (step.mean, step.std)
        )
        return cls(torch.full((), 255.0, device=device), mean, std)


def rendered(resident: Resident, orders: Orders, *, scales: Scales) -> Batch:
    """Carry out the orders of a batch.

    Args:
        resident: The set.
        orders: What to do.
        scales: What to normalise by.

    Returns:
        Images, (batch, 3, height, width), float32, and labels, (batch,), int64, both on the
        set's device.
    """
    here = partial(torch.Tensor.to, device=resident.device, non_blocking=True)
    places, rows, values = here(orders.places), here(orders.rows), here(orders.values)
    images = _resized(resident.images[places], orders)
    for name, start, stop in orders.groups:
        chosen, numbers = images[rows[start:stop]], values[start:stop]
        for piece in pieces(chosen):
            chosen[piece] = OPERATIONS[name](chosen[piece], numbers[piece])
        images[rows[start:stop]] = chosen
    pixels = _normalized(images, scales)
    _erase(pixels, orders, here(orders.filling))
    return pixels, resident.labels[places]


def _resized(images: Tensor, orders: Orders) -> Tensor:
    """Resize the box of each image, with the interpolation drawn for it."""
    boxes = orders.boxes.to(images.device, non_blocking=True)
    kinds = orders.cubic.unique().tolist()
    if len(kinds) == 1:
        return resize(images, boxes, orders.size, cubic=kinds[0])
    result = images.new_empty(len(images), 3, *orders.size)
    for cubic in kinds:
        own = (orders.cubic == cubic).nonzero().flatten().to(images.device, non_blocking=True)
        result[own] = resize(images[own], boxes[own], orders.size, cubic=cubic)
    return result


def _normalized(images: Tensor, scales: Scales) -> Tensor:
    """Bring levels to [0, 1] and normalise."""
    result = torch.empty_like(images, dtype=torch.float32)
    for piece in pieces(images):
        pixels = images[piece].float().div_(scales.levels)
        result[piece] = pixels.sub_(scales.mean).div_(scales.std)
    return result


def _erase(images: Tensor, orders: Orders, filling: Tensor) -> None:
    """Fill boxes of normalised images, in order, in place."""
    start = 0
    for row, top, bottom, left, right, height, width in orders.patches:
        stop = start + 3 * height * width
        piece = filling[start:stop].view(3, height, width)
        images[row, :, top:bottom, left:right] = piece
        start = stop


class ResidentTraining(TrainBatchesLoader):
    """The micro-batches of a run, made on the device of a resident set.

    Args:
        loader: Yields orders.
        resident: The set.
        recipe: Whose orders they are.
        order: What batches are made of.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        resident: Resident,
        recipe: Recipe,
        *,
        order: TrainBatches,
    ) -> None:
        super().__init__(loader, resident, order=order)
        scales = Scales.of(recipe.normalize, resident.device)
        self._rendered = partial(rendered, resident, scales=scales)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (batch, 3, height, width), float32, and labels (batch,), int64."""
        yield from map(self._rendered, self._read())


def resident_train_loader(
    resident: Resident,
    transform: Callable[..., Tensor],
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    pin_memory: bool = False,
    **share: Any,
) -> ResidentTraining:
    """Return what `train_loader` returns of the same set, made on the set's device.

    Args:
        resident: Training samples.
        transform: One of `fambav.data.transforms`.
        batch_size: Samples in a micro-batch of one process.
        seed: Seed of the run.
        workers: Processes that draw ahead; 0 draws in this one and reseeds its CPU generators.
        pin_memory: Whether orders go through page-locked memory, for a GPU.
        share: What `TrainBatches` takes besides: epochs, rank, world, accum, start_update, repeats.

    Returns:
        Batches with `updates_per_epoch`.

    Raises:
        ValueError: If an epoch has not enough samples for one update, or the transform has a step
            that is not offered on batches.
    """
    recipe = Recipe(transform, image_size=resident.image_size)
    batches = TrainBatches(len(resident), batch_size=batch_size, seed=seed, **share)
    loader = DataLoader(
        Draws(recipe, seed=seed),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=PATIENCE if workers else 0,
        worker_init_fn=outlast,
        collate_fn=collate,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    return ResidentTraining(loader, resident, recipe, order=batches)


class ResidentEvaluation:
    """Every sample once over all processes, made on the device of a resident set.

    Args:
        resident: Samples to evaluate.
        transform: What `fambav.data.eval_transform` returns.
        batch_size: Samples in a batch of one process; the last may be smaller.
        rank: Number of this process, which gets every world-th sample.
        world: Number of processes.
    """

    def __init__(
        self, resident: Resident, transform: Any, *, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        self._resident, self._batch_size = resident, batch_size
        self._places = torch.arange(len(resident), device=resident.device)[rank::world]
        first, *rest, normalize = transform.transforms
        self._resizing: Resizing = first(Recording(resident.image_size[::-1])).resizing
        self._cuts = [step for step in rest if not isinstance(step, KIT.ToTensor)]
        self._scales = Scales.of(normalize, resident.device)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._places) // self._batch_size)

    def left_out(self) -> int:
        """Return how many samples could not be read: all that are in memory could."""
        return 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (batch, 3, height, width), float32, and labels (batch,), int64."""
        for start in range(0, len(self._places), self._batch_size):  # none where none is left
            places = self._places[start : start + self._batch_size]
            yield self._made(self._resident.images[places]), self._resident.labels[places]

    def _made(self, images: Tensor) -> Tensor:
        """Resize, cut the centre out and normalise."""
        box, size, cubic = self._resizing
        boxes = torch.tensor([box], dtype=torch.float64, device=images.device)
        images = resize(images, boxes, size, cubic=cubic)
        for step in self._cuts:
            images = step(images)
        return _normalized(images, self._scales)
