"""What a data set is, and one that is held in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fambav.timm_compat import timm

Channels = tuple[float, ...]  # a number for each
IMAGENET_MEAN: Channels = timm.data.IMAGENET_DEFAULT_MEAN
IMAGENET_STD: Channels = timm.data.IMAGENET_DEFAULT_STD


IGNORE = 255  # label of pixels that neither teach nor count


class DataError(ValueError):
    """Data that is missing, truncated or damaged, in one sentence."""


class Samples(Protocol):
    """Inputs and targets by index: images and labels, or the past and the future of a series."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return one input, such as an image in RGB, and its target, such as a label."""


class ArraySet:
    """Images held as one array.

    Args:
        images: (count, height, width, 3), uint8.
        labels: (count,), integers, or of pixels, (count, height, width), uint8.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[Any]) -> None:
        self.images = images
        self.labels = labels if labels.ndim > 1 else labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        label = self.labels[index]
        return Image.fromarray(self.images[index]), label if label.ndim else int(label)

    def statistics(self) -> tuple[Channels, Channels]:
        """Return mean and standard deviation of each channel, for pixels in [0, 1]."""
        levels = np.arange(256) / 255
        means, deviations = [], []
        for channel in range(3):
            counts = np.bincount(self.images[..., channel].ravel(), minlength=256)
            share = counts / counts.sum()
            mean = float(share @ levels)
            means.append(mean)
            deviations.append(float(share @ (levels - mean) ** 2) ** 0.5)
        return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


def digest(*parts: ArraySet | NDArray[np.integer[Any]]) -> str:
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
        name: One of `fambav.registry.DATA_SETS`.
        train: Training samples.
        val: Held-out samples.
        choice: Samples by which the best epoch is chosen; None if `val` serves for both.
        num_classes: Length of a model's output; labels are 0 .. num_classes - 1.
        class_names: Names of the classes, if known.
        mean: The set's own mean of each channel, of images in [0, 1], if known.
        std: The set's own standard deviation of each channel, if known.
        notes: Sentences for the log.
        digest: sha256 of everything in it, for sets held in memory.
        uniform: Whether inputs of evaluation have one size, so that batches can be made of them.
        unscored: Classes that means over classes leave out.
        fewest: Least `num_classes` that there is something to learn with.
    """

    fewest: ClassVar[int] = 2
    name: str
    train: Samples
    val: Samples
    choice: Samples | None = None
    num_classes: int
    class_names: tuple[str, ...] | None = None
    mean: Channels | None = None
    std: Channels | None = None
    notes: tuple[str, ...] = ()
    digest: str | None = None
    uniform: bool = True
    unscored: tuple[int, ...] = ()

    @classmethod
    def in_memory(
        cls, name: str, train: ArraySet, val: ArraySet, *, class_names: tuple[str, ...], **more: Any
    ) -> DataSet:
        """Return a set with its statistics and the digest of both parts.

        Args:
            name: One of `fambav.registry.DATA_SETS`.
            train: Training samples.
            val: Validation samples.
            class_names: Names of the classes.
            more: Other attributes, or another digest.
        """
        mean, std = train.statistics()
        more.setdefault("digest", digest(train, val))
        return cls(
            name=name,
            train=train,
            val=val,
            num_classes=len(class_names),
            class_names=class_names,
            mean=mean,
            std=std,
            **more,
        )

    def check(self) -> None:
        """Read some of what training and evaluation will read, where files are likely to disagree.

        Raises:
            DataError: If some cannot be read, or do not fit together.
        """
        for samples in (self.train, self.val):
            if (check := getattr(samples, "check", None)) is not None:
                check()

    def facts(self, which: str) -> dict[str, Any]:
        """Return what a checkpoint says of the set: plain data.

        Args:
            which: As for `statistics`.
        """
        mean, std = self.statistics(which)
        return {
            "num_classes": self.num_classes,
            "class_names": self.class_names and list(self.class_names),
            "mean": list(mean),
            "std": list(std),
        }

    def statistics(self, which: str) -> tuple[Channels, Channels]:
        """Return the mean and standard deviation to normalise with.

        Args:
            which: "imagenet" or "own".

        Raises:
            ValueError: If `which` is "own" and the set's own are not known, or are 0.
        """
        if which == "imagenet":
            return IMAGENET_MEAN, IMAGENET_STD
        if self.mean is None or self.std is None or min(self.std) <= 0:
            raise ValueError(f"data_stats is {which!r}, expected 'imagenet' for {self.name}")
        return self.mean, self.std
