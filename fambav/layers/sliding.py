"""A dense model on images of any size: windows, mirrored and resized views, and their mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Box = tuple[int, int, int, int]
_TILE = 2  # sides of a window in that of a tile
_TOGETHER = 2**18  # pixels of windows that the model reads at once; one window at least


class SlidingWindow(nn.Module):
    """Logits of an image, the mean over the windows that see a pixel.

    The last window in each direction ends at the border.  An image that is smaller than a window
    is filled up with zeros, which is the mean of normalised pixels.  At scale s, windows are 1 / s
    as large and resized to the model's size, as if the image were s times as large.  With several
    scales or mirrored views, the result is the logarithm of the mean of the views' probabilities.

    Args:
        net: Returns (batch, classes, *, *) of (batch, channels, *window).
        window: Height and width that it reads, in pixels.
        overlap: Share of a window's side that the next one sees too, at least 0 and less than 1.
        scales: Of the views.
        flip: Take mirrored views too.

    Source: windows and views as in mmsegmentation's slide mode and test-time augmentation.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        window: tuple[int, int],
        overlap: float = 0.5,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.window, self.overlap = net, window, overlap
        self.scales, self.flip = tuple(scales), flip

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of images.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, classes, height, width), float32.
        """
        if len(self.scales) == 1 and not self.flip:
            return self._view(images, self.scales[0])
        sides = (False, True) if self.flip else (False,)
        views = [
            self._shares(images, scale, mirrored=side) for scale in self.scales for side in sides
        ]
        return (sum(views[1:], views[0]) / len(views)).log()

    def tiles(self, size: tuple[int, int]) -> Iterator[tuple[Box, Box]]:
        """Yield boxes of an image that need not be in memory as a whole.

        Args:
            size: Height and width of the image.

        Yields:
            The box to run, and the one in it whose logits are those of the whole image, up to
            border effects of scales other than 1; both as top, left, bottom, right.
        """
        steps = [_step(side, self.overlap) for side in self.window]
        margins = [-(-side // step) * step for side, step in zip(self.window, steps, strict=True)]
        starts = [
            range(0, extent, margin * _TILE) for extent, margin in zip(size, margins, strict=True)
        ]
        for top, left in product(*starts):
            height, width = (margin * _TILE for margin in margins)
            inner = (top, left, min(top + height, size[0]), min(left + width, size[1]))
            yield (
                (
                    max(0, top - margins[0]),
                    max(0, left - margins[1]),
                    min(inner[2] + margins[0], size[0]),
                    min(inner[3] + margins[1], size[1]),
                ),
                inner,
            )

    def _shares(self, images: Tensor, scale: float, *, mirrored: bool) -> Tensor:
        if mirrored:
            return self._view(images.flip(-1), scale).softmax(dim=1).flip(-1)
        return self._view(images, scale).softmax(dim=1)

    def _view(self, images: Tensor, scale: float) -> Tensor:
        height, width = images.shape[2:]
        tall, wide = (max(1, round(side / scale)) for side in self.window)
        if height < tall or width < wide:
            images = F.pad(images, (0, max(0, wide - width), 0, max(0, tall - height)))
        rows = _starts(images.shape[2], tall, self.overlap)
        columns = _starts(images.shape[3], wide, self.overlap)
        places = [
            (..., slice(top, top + tall), slice(left, left + wide))
            for top, left in product(rows, columns)
        ]
        total, seen = torch.zeros(()), images.new_zeros(images.shape[2:])
        several = max(1, _TOGETHER // (len(images) * self.window[0] * self.window[1]))
        for first in range(0, len(places), several):
            some = places[first : first + several]
            inputs = torch.cat([_resized(images[place], self.window) for place in some])
            logits = _resized(self.net(inputs), (tall, wide))
            if not total.ndim:
                total = logits.new_zeros(len(images), logits.shape[1], *images.shape[2:])
            for place, part in zip(some, logits.split(len(images)), strict=True):
                total[place] += part
                seen[place] += 1
        return total.div_(seen)[..., :height, :width]


def _starts(extent: int, side: int, overlap: float) -> list[int]:
    """Return where windows of a side start along an extent that is at least as long."""
    return [*range(0, extent - side, _step(side, overlap)), extent - side]


def _step(side: int, overlap: float) -> int:
    return max(1, round(side * (1 - overlap)))


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images, (batch, channels, *, *), in float32 and resized bilinearly if need be."""
    if tuple(images.shape[2:]) == size:
        return images.float()
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
