"""What a data set is, and one that lives in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fambav.timm_compat import timm

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = timm.data.IMAGENET_DEFAULT_MEAN
IMAGENET_STD: Triple = timm.data.IMAGENET_DEFAULT_STD


class DataError(ValueError):
    """Data that is missing, truncated or damaged, in one sentence."""


class Samples(Protocol):
    """Images and labels by place."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        """Return one image in RGB and its label."""


class ArraySet:
    """Images held as one array.

    Args:
        images: (count, height, width, 3), uint8.
        labels: (count,), integers.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[Any]) -> None:
        self.images = images
        self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[place]), int(self.labels[place])

    def statistics(self) -> tuple[Triple, Triple]:
        """Return mean and standard deviation of each channel, for pixels in [0, 1]."""
        values = np.arange(256) / 255
        means, deviations = [], []
        for channel in range(3):
            share = np.bincount(self.images[..., channel].ravel(), minlength=256)
            share = share / share.sum()
            mean = float(share @ values)
            means.append(mean)
            deviations.append(float(share @ (values - mean) ** 2) ** 0.5)
        return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


def digest(*parts: ArraySet | NDArray[np.int64]) -> str:
    """Return the sha256 of sets (images, then labels) and of plain integer arrays, in hex."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, ArraySet):
            sha.update(np.ascontiguousarray(part.images).data)
        labels = part.labels if isinstance(part, ArraySet) else part
        sha.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return sha.hexdigest()


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A training and a validation set with what a run needs to know about them.

    Attributes:
        name: The name it was asked for by.
        train: Samples to learn from.
        val: Held-out samples.
        num_classes: Labels are 0 .. num_classes - 1.
        class_names: Their names, if known.
        mean: Own mean of each channel in [0, 1], if known.
        std: Own standard deviation of each channel, if known.
        notes: Sentences for the log.
        digest: sha256 of everything in it, for sets held in memory.
    """

    name: str
    train: Samples
    val: Samples
    num_classes: int
    class_names: tuple[str, ...] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    notes: tuple[str, ...] = ()
    digest: str | None = None

    def statistics(self, which: str) -> tuple[Triple, Triple]:
        """Return the mean and standard deviation to normalise with.

        Args:
            which: "imagenet" or "own".

        Raises:
            ValueError: If the set's own are asked for and not known, or are 0.
        """
        if which == "imagenet":
            return IMAGENET_MEAN, IMAGENET_STD
        if self.mean is None or self.std is None or min(self.std) <= 0:
            raise ValueError(f"data_stats is {which!r}, expected 'imagenet' for {self.name}")
        return self.mean, self.std
