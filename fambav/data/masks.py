"""Images with masks: transforms that treat both alike, by torchvision.transforms.v2.

Every draw comes from torch's global generator, so that seeding it decides the result.

Source: the training pipeline of mmsegmentation for ADE20K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fambav.config import Augment
from fambav.data.types import IGNORE, Channels
from fambav.timm_compat import torchvision

V2, TV = torchvision.transforms.v2, torchvision.tv_tensors
Pair = tuple[Tensor, Tensor]
_LARGEST_SHARE, _TRIES = 0.75, 10  # of one class in a crop, and draws to stay below it


class TrainMasks:
    """Resizes an image by a random factor, cuts a crop, mirrors and recolours it.

    A crop in which one class has more than 75% of the labelled pixels is drawn anew, up to 10
    times in all.  Where the image is smaller than the crop, it is filled up with black, and the
    mask with IGNORE.

    Args:
        augment: Its resize_range, hflip, vflip and color_jitter.
        size: Height and width of the crop, in pixels.
        statistics: Mean and standard deviation of the channels, to normalise with.
    """

    paired = True

    def __init__(
        self, augment: Augment, size: tuple[int, int], statistics: tuple[Channels, Channels]
    ) -> None:
        self.scales = augment.resize_range
        fill = {TV.Image: 0, TV.Mask: IGNORE}
        self.crop = V2.RandomCrop(size, pad_if_needed=True, fill=fill)
        jitter = augment.color_jitter
        self.rest = V2.Compose(
            [
                V2.RandomHorizontalFlip(augment.hflip),
                V2.RandomVerticalFlip(augment.vflip),
                *([V2.ColorJitter(jitter, jitter, jitter)] if jitter else []),
                *_to_tensors(statistics),
            ]
        )

    def __call__(self, image: Image.Image, mask: NDArray[np.uint8]) -> Pair:
        """Return the crop, (3, height, width), float32, and its labels, (height, width), int64."""
        pair = _paired(image, mask)
        low, high = self.scales
        if (low, high) != (1, 1):
            factor = low + (high - low) * float(torch.rand(()))
            size = [max(1, round(side * factor)) for side in pair[0].shape[1:]]
            pair = V2.Resize(size, antialias=True)(*pair)
        for _ in range(_TRIES):
            crop = self.crop(*pair)
            if _largest_share(crop[1]) <= _LARGEST_SHARE:
                break
        return _plain(self.rest(*crop))


class EvalMasks:
    """Normalises an image, which stays as large as it is.

    Args:
        statistics: Mean and standard deviation of the channels.
    """

    paired = True

    def __init__(self, statistics: tuple[Channels, Channels]) -> None:
        self.steps = V2.Compose(_to_tensors(statistics))

    def __call__(self, image: Image.Image, mask: NDArray[np.uint8] | None = None) -> Any:
        """Return a tensor as `TrainMasks`, and its labels if there is a mask."""
        if mask is None:
            tensor: Tensor = self.steps(_image(image)).as_subclass(Tensor)
            return tensor
        return _plain(self.steps(*_paired(image, mask)))


def _to_tensors(statistics: tuple[Channels, Channels]) -> list[Any]:
    types = {TV.Image: torch.float32, TV.Mask: torch.int64, "others": None}
    return [V2.ToDtype(types, scale=True), V2.Normalize(*map(list, statistics))]


def _image(image: Image.Image) -> Any:
    return TV.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1))  # (3, height, width)


def _paired(image: Image.Image, mask: NDArray[np.uint8]) -> Any:
    """Return both as what torchvision keeps together.

    Raises:
        ValueError: If they differ in size.
    """
    width, height = image.size
    if mask.shape != (height, width):
        wanted = f"{width} x {height} as its image"
        raise ValueError(f"mask is {mask.shape[1]} x {mask.shape[0]}, expected {wanted}")
    return _image(image), TV.Mask(torch.from_numpy(np.ascontiguousarray(mask)))


def _plain(pair: Any) -> Pair:
    image, mask = pair
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def _largest_share(mask: Any) -> float:
    """Return the share of the most frequent class among the labelled pixels; 0 without any."""
    counts = torch.bincount(mask.as_subclass(Tensor).flatten().int(), minlength=256)
    counts[IGNORE] = 0
    return float(counts.max() / counts.sum().clamp(min=1))
