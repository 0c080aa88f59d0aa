"""Operations on batches of 8-bit images, each with parameters of its own, to the bits of Pillow.

Functions of `torchvision.transforms.v2` take one set of parameters for a whole batch, and round
otherwise than Pillow where they interpolate or blend.  Those that have no parameters and agree with
Pillow are used.

An operation takes images, (batch, 3, height, width), uint8, and a row of numbers for every image,
float64, of which it reads the first few; it returns images of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fambav.timm_compat import torchvision

Operation = Callable[[Tensor, Tensor], Tensor]
F = torchvision.transforms.v2.functional

_CACHED = 300_000  # numbers that a few temporary tensors may have each
_BITS = 22  # of the weights by which Pillow resizes
_SUPPORT = {True: 2.0, False: 1.0}  # pixels, by cubic
_TAPS = {True: (-1, 0, 1, 2), False: (0, 1)}  # pixels around a position, by cubic
_RED, _GREEN, _BLUE = 19595, 38470, 7471  # luma of ITU-R 601, times 2**16
_BLUR_PASSES = 3


def chunks(images: Tensor) -> Iterator[slice]:
    """Yield slices of a batch: the whole on a GPU, as many images as a cache can hold on a CPU.

    Args:
        images: (batch, ...).
    """
    count = len(images)
    size = count if images.is_cuda else max(1, _CACHED // images[0].numel())
    for start in range(0, count, size):
        yield slice(start, start + size)


def resized_crop(images: Tensor, boxes: Tensor, size: tuple[int, int], *, cubic: bool) -> Tensor:
    """Cut a box out of every image and resize it, with a filter as wide as it shrinks.

    Pillow resizes along rows, rounds to 8 bits and resizes along columns, with weights of 22 bits;
    in float64 such sums are exact in any order, on any device.

    Args:
        images: (batch, 3, height, width), uint8.
        boxes: Left, top, right and bottom in whole pixels, (batch or 1, 4), float64.
        size: Height and width of the result.
        cubic: Bicubic with a = -1/2, or else bilinear.

    Returns:
        (batch, 3, *size), uint8.
    """
    left, top, right, bottom = boxes.unbind(1)
    across = _resize_weights(left, right, images.shape[3], size[1], cubic=cubic)
    down = _resize_weights(top, bottom, images.shape[2], size[0], cubic=cubic)
    if len(boxes) == 1:
        across, down = across.expand(len(images), -1, -1), down.expand(len(images), -1, -1)
    result = images.new_empty(*images.shape[:2], *size)
    for chunk in chunks(result):
        wide = _rounded(images[chunk].double() @ across[chunk].mT[:, None])
        result[chunk] = _rounded(down[chunk, None] @ wide.double())
    return result


def _rounded(values: Tensor) -> Tensor:
    """Round to 8 bits, halves up, clamped; changed in place."""
    return values.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _resize_weights(
    start: Tensor, stop: Tensor, source: int, length: int, *, cubic: bool
) -> Tensor:
    """Return the weight of each pixel of a line in each pixel of its resized part.

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
    centre = (torch.arange(length, device=start.device).double() + 0.5) * scale  # (batch, length)
    reach = _SUPPORT[cubic] * shrink
    first = (centre - reach + 0.5).trunc().clamp(min=0)
    last = torch.minimum((centre + reach + 0.5).trunc(), (stop - start)[:, None])
    # Pillow adds the weights of a pixel from the left; another order may round differently.
    total = torch.zeros_like(centre)
    for tap in range(2 * int(_SUPPORT[cubic] * max(1.0, source / length)) + 3):
        pixel = first + tap
        weight = _filter((pixel - centre + 0.5) * (1 / shrink), cubic=cubic)
        total += torch.where(pixel < last, weight, 0)
    pixel = torch.arange(source, device=start.device).double() - start[:, None, None]
    weight = _filter((pixel - centre[..., None] + 0.5) * (1 / shrink[..., None]), cubic=cubic)
    used = (pixel >= first[..., None]) & (pixel < last[..., None])  # (batch, length, source)
    weight = torch.where(used, weight / total[..., None], 0) * (1 << _BITS)
    whole = (weight.abs() + 0.5).floor().copysign(weight)
    return whole / (1 << _BITS)


def _filter(x: Tensor, *, cubic: bool) -> Tensor:
    """Return the resizing filter at a distance in pixels."""
    x = x.abs()
    if not cubic:
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def shift(images: Tensor, values: Tensor, *, reflect: bool) -> Tensor:
    """Move every image by whole pixels over a black or a mirrored border.

    Args:
        images: (batch, 3, height, width), uint8.
        values: Row and column of the image that come first, (batch, 2 or more).
        reflect: Repeat the image from the edge inwards, without the edge itself.

    Returns:
        As `images`.
    """
    pixels, inside = images.permute(0, 2, 3, 1), torch.ones(1, device=images.device).bool()
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    sources = []
    for axis, length in enumerate(images.shape[2:]):
        line = values[:, axis, None].long() + torch.arange(length, device=images.device)
        line = line.view(-1, *((length, 1) if axis == 0 else (1, length)))
        if reflect:
            line = length - 1 - (length - 1 - line.abs()).abs()
        else:
            inside = inside & (line >= 0) & (line < length)  # (batch, height, width) in the end
            line = line.clamp(0, length - 1)
        sources.append(line)
    return (pixels[batch, sources[0], sources[1]] * inside[..., None]).permute(0, 3, 1, 2)


def affine(images: Tensor, values: Tensor, *, axes: str, cubic: bool) -> Tensor:
    """Map every image by an affine map of its own.

    Args:
        images: (batch, 3, height, width), uint8.
        values: Map from (column, row, 1) in the result to column and row in the image, and the
            colour outside the image, (batch, 9), float64.
        axes: "across" if rows stay rows; "down" if columns stay columns, where columns and rows
            have changed places in the map; else "both".
        cubic: Bicubic with a = -1, or else bilinear.

    Returns:
        As `images`.
    """
    if axes == "down":
        return affine(images.mT, values, axes="across", cubic=cubic).mT
    height, width = images.shape[2:]
    a, b, c, d, e, f, *fill = values[..., None, None].unbind(1)
    x = torch.arange(width, dtype=values.dtype, device=values.device) + 0.5
    y = torch.arange(height, dtype=values.dtype, device=values.device)[:, None] + 0.5
    u, v = a * x + b * y + c, d * x + e * y + f  # (batch, height, width)
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    red, green, blue = images.int().unbind(1)
    packed = red | green << 8 | blue << 16  # so that a pixel is read at once
    interpolate = _interpolate_rows_and_columns if axes == "both" else _interpolate_rows
    mapped = interpolate(packed, u - 0.5, v - 0.5, cubic=cubic)
    outside = torch.stack(fill, dim=1).to(torch.uint8)
    return torch.where(inside[:, None], _truncated(mapped), outside)


def _interpolate_rows(packed: Tensor, u: Tensor, v: Tensor, *, cubic: bool) -> Tensor:
    """Interpolate along rows, at whole v; returns (batch, 3, height, width), float64."""
    height, width = packed.shape[1:]
    row = v.floor().long().clamp(0, height - 1) * width
    first = u.floor()
    column, fraction = first.long(), (u - first)[:, None]
    shifts = torch.arange(0, 24, 8, dtype=packed.dtype, device=packed.device).view(3, 1, 1)

    def pixel(offset: int) -> Tensor:
        index = row + (column + offset).clamp(0, width - 1)
        read = packed.flatten(1).gather(1, index.flatten(1)).view(index.shape)
        return ((read[:, None] >> shifts) & 255).double()

    return _interpolate([pixel(offset) for offset in _TAPS[cubic]], fraction)


def _interpolate_rows_and_columns(packed: Tensor, u: Tensor, v: Tensor, *, cubic: bool) -> Tensor:
    first = v.floor()
    rows = [_interpolate_rows(packed, u, first + tap, cubic=cubic) for tap in _TAPS[cubic]]
    return _interpolate(rows, (v - first)[:, None])


def _interpolate(points: list[Tensor], fraction: Tensor) -> Tensor:
    """Interpolate between the middle two of four points, or between two; in Pillow's order."""
    if len(points) == 2:
        low, high = points
        return low + (high - low) * fraction
    a, b, c, d = points
    second, third = 2 * (a - b) + c - d, b - a - c + d
    return b + fraction * ((c - a) + fraction * (second + fraction * third))


def posterize(images: Tensor, values: Tensor) -> Tensor:
    """Keep the highest bits; with none of them the image is black."""
    kept = values[:, 0].long().clamp(0, 8)
    mask = 256 - torch.bitwise_left_shift(torch.ones_like(kept), 8 - kept)
    return images & _per_image(mask).to(torch.uint8)


def solarize(images: Tensor, values: Tensor) -> Tensor:
    """Invert the levels from a threshold on."""
    return torch.where(images < _per_image(values[:, 0]), images, 255 - images)


def solarize_add(images: Tensor, values: Tensor) -> Tensor:
    """Lighten the levels below 128."""
    lighter = (images.short() + _per_image(values[:, 0]).short()).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, lighter, images)


def grayscale(images: Tensor, _: Tensor) -> Tensor:
    """Take the luma for every channel."""
    return _luma(images).expand_as(images)


def adjust_saturation(images: Tensor, values: Tensor) -> Tensor:
    """Go from grey, at 0, through the image, at 1, and on."""
    return _blend(_luma(images), images, values)


def adjust_contrast(images: Tensor, values: Tensor) -> Tensor:
    """Go from the mean luma, at 0, through the image, at 1, and on."""
    luma = _luma(images).flatten(1)
    count = luma.shape[1]
    mean = torch.div(2 * luma.sum(1) + count, 2 * count, rounding_mode="floor")
    return _blend(_per_image(mean), images, values)


def adjust_brightness(images: Tensor, values: Tensor) -> Tensor:
    """Go from black, at 0, through the image, at 1, and on."""
    return _blend(torch.zeros_like(images[:, :1, :1, :1]), images, values)


def adjust_sharpness(images: Tensor, values: Tensor) -> Tensor:
    """Go from a smoothed image, at 0, through the image, at 1, and on; edges stay."""
    x, smooth = images.short(), images.clone()
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = torch.div(2 * total + 13, 26, rounding_mode="floor").byte()
    return _blend(smooth, images, values)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch every channel to the whole range."""
    pixels = images.flatten(2)  # (batch, 3, height * width)
    low, high = (end.double()[..., None] for end in torch.aminmax(pixels, dim=2))
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    flat = high <= low
    scale = torch.full_like(low, 255) / torch.where(flat, 1, high - low)  # 255 / x is less exact
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    table = torch.where(flat, levels, stretched).to(torch.uint8)  # (batch, 3, 256)
    return table.gather(2, pixels.long()).view_as(images)


def gaussian_blur(images: Tensor, values: Tensor) -> Tensor:
    """Blur by boxes, as Pillow approximates a Gaussian.

    The numbers are weights at distance 0, 1 and 2, times 2**24.
    """
    for _ in range(_BLUR_PASSES):
        images = _box_blur(images, values)
    for _ in range(_BLUR_PASSES):
        images = _box_blur(images.mT, values).mT
    return images


def _box_blur(images: Tensor, values: Tensor) -> Tensor:
    width = images.shape[3]
    column = torch.arange(-2, width + 2, device=images.device).clamp(0, width - 1)
    x = images[..., column].double()  # (batch, 3, height, width + 4)
    middle, near, far = (_per_image(values[:, n]) for n in range(3))
    total = middle * x[..., 2:-2] + near * (x[..., 1:-3] + x[..., 3:-1])
    total += far * (x[..., :-4] + x[..., 4:])
    result: Tensor = (total + (1 << 23)) / (1 << 24)
    return result.to(torch.uint8)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _truncated(values: Tensor) -> Tensor:
    """Clamp to 8 bits and drop the fraction, as Pillow does; changed in place."""
    return values.clamp_(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """Return (batch, 1, height, width), uint8."""
    red, green, blue = images.int().split(1, dim=1)
    total = _RED * red + _GREEN * green + _BLUE * blue + (1 << 15)
    result: Tensor = total >> 16
    return result.to(torch.uint8)


def _blend(start: Tensor, stop: Tensor, values: Tensor) -> Tensor:
    """Go from one image, at 0, through another, at 1, and on."""
    start = start.float()
    return _truncated(start + _per_image(values[:, 0]).float() * (stop - start))


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": autocontrast,
    "Blur": gaussian_blur,
    "Brightness": adjust_brightness,
    "Color": adjust_saturation,
    "Contrast": adjust_contrast,
    "Equalize": lambda images, _: F.equalize(images),
    "FLIP_LEFT_RIGHT": lambda images, _: images.flip(3),
    "Grayscale": grayscale,
    "Invert": lambda images, _: F.invert(images),
    "Posterize": posterize,
    "ROTATE_90": lambda images, _: images.rot90(1, (2, 3)),
    "ROTATE_180": lambda images, _: images.rot90(2, (2, 3)),
    "ROTATE_270": lambda images, _: images.rot90(3, (2, 3)),
    "Sharpness": adjust_sharpness,
    "Shift": partial(shift, reflect=False),
    "ShiftReflect": partial(shift, reflect=True),
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    **{
        f"Affine{axes.title()}{kind}": partial(affine, axes=axes, cubic=kind == "Cubic")
        for axes in ("across", "down", "both")
        for kind in ("Cubic", "Linear")
    },
}
