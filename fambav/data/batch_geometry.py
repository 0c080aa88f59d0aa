"""Resizing, shifting and turning batches of 8-bit images, to the bits that Pillow gives.

Pillow resizes along rows, rounds to 8 bits and resizes along columns, with weights of 22 bits; in
float64 such sums are exact in any order, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BITS = 22  # of the weights
_SUPPORT = {True: 2.0, False: 1.0}  # pixels, by cubic
_CACHED = 300_000  # numbers that a few temporary tensors may have each
_TAPS = {True: (-1, 0, 1, 2), False: (0, 1)}  # pixels around a place, by cubic


def resize(images: Tensor, boxes: Tensor, size: tuple[int, int], *, cubic: bool) -> Tensor:
    """Cut a box out of every image and resize it, with a filter as wide as it shrinks.

    Args:
        images: (batch, 3, height, width), uint8.
        boxes: Left, top, right and bottom in whole pixels, (batch or 1, 4), float64.
        size: Height and width of the result.
        cubic: Bicubic with a = -1/2, or else bilinear.

    Returns:
        (batch, 3, *size), uint8.
    """
    left, top, right, bottom = boxes.unbind(1)
    across = _weights(left, right, images.shape[3], size[1], cubic=cubic)
    down = _weights(top, bottom, images.shape[2], size[0], cubic=cubic)
    if len(boxes) == 1:
        across, down = across.expand(len(images), -1, -1), down.expand(len(images), -1, -1)
    result = images.new_empty(*images.shape[:2], *size)
    for piece in pieces(result):
        wide = _bytes(images[piece].double() @ across[piece].mT[:, None])
        result[piece] = _bytes(down[piece, None] @ wide.double())
    return result


def pieces(images: Tensor) -> Iterator[slice]:
    """Take all images at once on a GPU, as many as a cache can hold on a CPU.

    Args:
        images: (batch, ...).
    """
    count = len(images)
    most = count if images.is_cuda else max(1, _CACHED // images[0].numel())
    for start in range(0, count, most):
        yield slice(start, start + most)


def _bytes(values: Tensor) -> Tensor:
    """Round to 8 bits, halves up; what is out of range goes to its end; changed in place."""
    return values.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _weights(start: Tensor, stop: Tensor, source: int, length: int, *, cubic: bool) -> Tensor:
    """Return what each pixel of a line counts in each pixel of the resized part.

    Args:
        start: First pixel of the part, (batch,).
        stop: Last + 1.
        source: Pixels of the line.
        length: Pixels of the result.
        cubic: Bicubic, or else bilinear.

    Returns:
        (batch, length, source), float64, multiples of 2**-22.
    """
    scale = (stop - start)[:, None]
    scale = scale / torch.full_like(scale, length)  # a GPU divides by a number less exactly
    shrink = scale.clamp(min=1)
    centre = (torch.arange(length, device=start.device).double() + 0.5) * scale
    reach = _SUPPORT[cubic] * shrink
    first = (centre - reach + 0.5).trunc().clamp(min=0)
    last = torch.minimum((centre + reach + 0.5).trunc(), (stop - start)[:, None])
    # Pillow adds the weights of a pixel from the left; another order may round differently.
    taps = 2 * int(_SUPPORT[cubic] * max(1.0, source / length)) + 3
    total = torch.zeros_like(centre)
    for tap in range(taps):
        place = first + tap
        weight = _kernel((place - centre + 0.5) * (1 / shrink), cubic=cubic)
        total += torch.where(place < last, weight, 0)
    place = torch.arange(source, device=start.device).double() - start[:, None, None]
    weight = _kernel((place - centre[..., None] + 0.5) * (1 / shrink[..., None]), cubic=cubic)
    used = (place >= first[..., None]) & (place < last[..., None])
    weight = torch.where(used, weight / total[..., None], 0) * (1 << _BITS)
    whole = (weight.abs() + 0.5).floor().copysign(weight)
    return whole / (1 << _BITS)


def _kernel(x: Tensor, *, cubic: bool) -> Tensor:
    """Return the filter at a distance in pixels."""
    x = x.abs()
    if not cubic:
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def shift(images: Tensor, values: Tensor, *, mirrored: bool) -> Tensor:
    """Move every image by whole pixels over a black or a mirrored border.

    Args:
        images: (batch, 3, height, width), uint8.
        values: Row and column of the image that come first, (batch, 2 or more).
        mirrored: Repeat the image from the edge inwards, without the edge itself.

    Returns:
        As `images`.
    """
    height, width = images.shape[2:]
    by = values[:, :2].long()
    rows = by[:, :1] + torch.arange(height, device=images.device)
    columns = by[:, 1:] + torch.arange(width, device=images.device)
    if mirrored:
        rows, columns = (
            (size - 1 - (size - 1 - place.abs()).abs())
            for place, size in ((rows, height), (columns, width))
        )
        return _pick(images, rows, columns)
    inside = _within(rows, height)[:, None, :, None] & _within(columns, width)[:, None, None, :]
    found = _pick(images, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    return found * inside


def _within(place: Tensor, size: int) -> Tensor:
    return (place >= 0) & (place < size)


def _pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def warp(images: Tensor, values: Tensor, *, axes: str, cubic: bool) -> Tensor:
    """Map every image by an affine map of its own.

    Args:
        images: (batch, 3, height, width), uint8.
        values: Map from (column, row, 1) in the result to column and row in the image, and the
            colour of what comes from outside, (batch, 9), float64.
        axes: "across" if rows stay rows; "down" if columns stay columns, where columns and rows
            have changed places in the map; else "both".
        cubic: Bicubic with a = -1, or else bilinear.

    Returns:
        As `images`.
    """
    if axes == "down":
        return warp(images.mT, values, axes="across", cubic=cubic).mT
    height, width = images.shape[2:]
    a, b, c, d, e, f, *fill = values[..., None, None].unbind(1)
    x = torch.arange(width, dtype=values.dtype, device=values.device) + 0.5
    y = torch.arange(height, dtype=values.dtype, device=values.device)[:, None] + 0.5
    u, v = a * x + b * y + c, d * x + e * y + f
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    red, green, blue = images.int().unbind(1)
    packed = red | green << 8 | blue << 16  # so that a pixel is read at once
    lines = _lines if axes == "both" else _row
    found = lines(packed, u - 0.5, v - 0.5, cubic=cubic)
    outside = torch.stack(fill, dim=1).to(torch.uint8)
    # Pillow drops what follows the point.
    return torch.where(inside[:, None], found.clamp_(0, 255).to(torch.uint8), outside)


def _row(packed: Tensor, u: Tensor, v: Tensor, *, cubic: bool) -> Tensor:
    """Interpolate along rows, at whole v."""
    height, width = packed.shape[1:]
    row = v.floor().long().clamp(0, height - 1) * width
    first = u.floor()
    column, part = first.long(), (u - first)[:, None]
    shifts = torch.arange(0, 24, 8, dtype=packed.dtype, device=packed.device).view(3, 1, 1)

    def pixel(by: int) -> Tensor:
        index = row + (column + by).clamp(0, width - 1)
        found = packed.flatten(1).gather(1, index.flatten(1)).view(index.shape)
        return ((found[:, None] >> shifts) & 255).double()

    return _between([pixel(by) for by in _TAPS[cubic]], part)


def _lines(packed: Tensor, u: Tensor, v: Tensor, *, cubic: bool) -> Tensor:
    """Interpolate along rows, then along columns."""
    first = v.floor()
    rows = [_row(packed, u, first + by, cubic=cubic) for by in _TAPS[cubic]]
    return _between(rows, (v - first)[:, None])


def _between(points: list[Tensor], part: Tensor) -> Tensor:
    """Interpolate between the middle two of four points, or between two; in Pillow's order."""
    if len(points) == 2:
        low, high = points
        return low + (high - low) * part
    a, b, c, d = points
    second, third = 2 * (a - b) + c - d, b - a - c + d
    return b + part * ((c - a) + part * (second + part * third))
