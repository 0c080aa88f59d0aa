"""Images that live on the training device, augmented there in batches.

    keys -> sampled parameters (CPU) -> gather, crop and resize, operations, normalise, erase

The result is that of the transform itself on the same images, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fambav.data.augment_params import (
    BatchParams,
    ParamSampler,
    ProxyImage,
    ProxySamples,
    collate_params,
)
from fambav.data.device_ops import OPERATIONS, chunks, resized_crop
from fambav.data.loaders import Batch, TrainBatchesLoader, train_loader
from fambav.data.transforms import TV, Transform
from fambav.data.types import ArraySet, Samples


class DeviceSet:
    """Images and labels of a device-resident set.

    Attributes:
        images: (count, 3, height, width), uint8.
        labels: (count,), int64.

    Args:
        samples: A set held in memory.
        device: Where to put it.

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


class Normalize:
    """Brings batches of 8-bit images to [0, 1] and normalises them, on a device.

    Args:
        step: torchvision's `Normalize`.
        device: Where the images are.
    """

    def __init__(self, step: Any, device: torch.device) -> None:
        self._mean, self._std = (
            torch.as_tensor(channels, dtype=torch.float32, device=device).view(3, 1, 1)
            for channels in (step.mean, step.std)
        )
        self._levels = torch.full(
            (), 255.0, device=device
        )  # a GPU divides by a number less exactly

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32, (batch, 3, height, width), of uint8."""
        result = torch.empty_like(images, dtype=torch.float32)
        for chunk in chunks(images):
            pixels = images[chunk].float().div_(self._levels)
            result[chunk] = pixels.sub_(self._mean).div_(self._std)
        return result


def augment(samples: DeviceSet, params: BatchParams, *, normalize: Normalize) -> Batch:
    """Make a batch of sampled parameters.

    Args:
        samples: The set.
        params: Which samples, and what happens to each.
        normalize: Makes the floats.

    Returns:
        Images, (batch, 3, height, width), float32, and labels, (batch,), int64, both on the
        set's device.
    """
    upload = partial(torch.Tensor.to, device=samples.device, non_blocking=True)
    indices, rows, values = upload(params.indices), upload(params.rows), upload(params.values)
    images = _crop(samples.images[indices], params)
    for name, start, stop in params.groups:
        chosen, numbers = images[rows[start:stop]], values[start:stop]
        for chunk in chunks(chosen):
            chosen[chunk] = OPERATIONS[name](chosen[chunk], numbers[chunk])
        images[rows[start:stop]] = chosen
    pixels = normalize(images)
    filling, start = upload(params.filling), 0
    for row, top, bottom, left, right, height, width in params.erasings:
        stop = start + 3 * height * width
        pixels[row, :, top:bottom, left:right] = filling[start:stop].view(3, height, width)
        start = stop
    return pixels, samples.labels[indices]


def _crop(images: Tensor, params: BatchParams) -> Tensor:
    """Crop and resize each image, with the interpolation sampled for it."""
    boxes = params.boxes.to(images.device, non_blocking=True)
    kinds = params.cubic.unique().tolist()
    if len(kinds) == 1:
        return resized_crop(images, boxes, params.size, cubic=kinds[0])
    result = images.new_empty(len(images), 3, *params.size)
    for cubic in kinds:
        rows = (params.cubic == cubic).nonzero().flatten().to(images.device, non_blocking=True)
        result[rows] = resized_crop(images[rows], boxes[rows], params.size, cubic=cubic)
    return result


def device_train_loader(
    samples: DeviceSet, transform: Transform, **options: Any
) -> TrainBatchesLoader:
    """Return the batches of `train_loader` of the same set, made on the set's device.

    Loader processes only sample parameters.

    Args:
        samples: Training samples.
        transform: What `fambav.data.train_transform` returns.
        options: Those of `train_loader`.

    Raises:
        ValueError: If an epoch has not enough samples for one update, or the transform has a step
            that is not offered on batches.
    """
    sampler = ParamSampler(transform)
    return train_loader(
        ProxySamples(len(samples), image_size=samples.image_size),
        sampler,
        collate_fn=collate_params,
        finish=partial(augment, samples, normalize=Normalize(sampler.normalize, samples.device)),
        **options,
    )


class DeviceEvalLoader:
    """Every sample once over all processes, made on the device of the set.

    Args:
        samples: Samples to evaluate.
        transform: What `fambav.data.eval_transform` returns.
        batch_size: Samples in a batch of one process; the last may be smaller.
        rank: Number of this process.
        world: Number of processes.
    """

    def __init__(
        self, samples: DeviceSet, transform: Any, *, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        self._samples, self._batch_size = samples, batch_size
        self._indices = torch.arange(len(samples), device=samples.device)[rank::world]
        resize, *steps, normalize = transform.transforms
        self._crop = resize(ProxyImage(samples.image_size[::-1])).crop_params
        self._steps = [step for step in steps if not isinstance(step, TV.ToTensor)]
        self._normalize = Normalize(normalize, samples.device)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._indices) // self._batch_size)

    def skipped(self) -> int:
        """Return 0: samples in memory are never corrupt."""
        return 0

    def indices(self) -> list[int]:
        """Return the indices of the samples, in order."""
        indices: list[int] = self._indices.tolist()
        return indices

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (batch, 3, height, width), float32, and labels (batch,), int64."""
        for start in range(0, len(self._indices), self._batch_size):
            indices = self._indices[start : start + self._batch_size]
            yield self._transformed(self._samples.images[indices]), self._samples.labels[indices]

    def _transformed(self, images: Tensor) -> Tensor:
        box, size, cubic = self._crop
        boxes = torch.tensor([box], dtype=torch.float64, device=images.device)
        images = resized_crop(images, boxes, size, cubic=cubic)
        for step in self._steps:
            images = step(images)
        return self._normalize(images)
