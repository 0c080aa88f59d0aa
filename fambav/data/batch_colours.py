"""Operations on the colours of batches of 8-bit images, to the bits that Pillow gives.

Each takes images, (batch, 3, height, width), uint8, and a row of numbers for every image, float64,
of which it reads the first few; it returns images of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Operation = Callable[[Tensor, Tensor], Tensor]

_RED, _GREEN, _BLUE = 19595, 38470, 7471  # luma of ITU-R 601, times 2**16
_PASSES = 3


def invert(images: Tensor, _: Tensor) -> Tensor:
    """Turn every channel around."""
    return 255 - images


def posterize(images: Tensor, values: Tensor) -> Tensor:
    """Keep the highest bits; none of them leaves black."""
    kept = values[:, 0].long().clamp(0, 8)
    mask = 256 - torch.bitwise_left_shift(torch.ones_like(kept), 8 - kept)
    return images & _each(mask).to(torch.uint8)


def solarize(images: Tensor, values: Tensor) -> Tensor:
    """Turn around what is at least a threshold."""
    return torch.where(images < _each(values[:, 0]), images, 255 - images)


def solarize_add(images: Tensor, values: Tensor) -> Tensor:
    """Lighten what is below 128."""
    lighter = (images.short() + _each(values[:, 0]).short()).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, lighter, images)


def grey(images: Tensor, _: Tensor) -> Tensor:
    """Take the luma for every channel."""
    return _luma(images).expand_as(images)


def color(images: Tensor, values: Tensor) -> Tensor:
    """Go from grey, at 0, through the image, at 1, and on."""
    return _blend(_luma(images), images, values)


def contrast(images: Tensor, values: Tensor) -> Tensor:
    """Go from the mean luma, at 0, through the image, at 1, and on."""
    luma = _luma(images).flatten(1)
    count = luma.shape[1]
    mean = torch.div(2 * luma.sum(1) + count, 2 * count, rounding_mode="floor")
    return _blend(_each(mean), images, values)


def brightness(images: Tensor, values: Tensor) -> Tensor:
    """Go from black, at 0, through the image, at 1, and on."""
    return _blend(torch.zeros_like(images[:, :1, :1, :1]), images, values)


def sharpness(images: Tensor, values: Tensor) -> Tensor:
    """Go from a smoothed image, at 0, through the image, at 1, and on; edges stay."""
    x, smooth = images.short(), images.clone()
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = torch.div(2 * total + 13, 26, rounding_mode="floor").byte()
    return _blend(smooth, images, values)


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch every channel to the whole range."""
    pixels = images.flatten(2)
    low, high = (end.double()[..., None] for end in torch.aminmax(pixels, dim=2))
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    flat = high <= low
    scale = torch.full_like(low, 255) / torch.where(flat, 1, high - low)  # 255 / x is less exact
    table = (levels * scale + -low * scale).clamp(0, 255)
    return _look_up(pixels, torch.where(flat, levels, table)).view_as(images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Spread the levels of every channel evenly."""
    pixels = images.flatten(2)
    lines = pixels.flatten(0, 1).long()
    offset = 256 * torch.arange(len(lines), device=images.device)[:, None]
    ones = torch.ones_like(lines).flatten()
    counts = torch.zeros(256 * len(lines), dtype=torch.int64, device=images.device)
    counts = counts.scatter_add_(0, (lines + offset).flatten(), ones).view(*pixels.shape[:2], 256)
    highest = pixels.amax(2, keepdim=True).long()
    step = (pixels.shape[2] - counts.gather(2, highest)) // 255
    below = counts.cumsum(2) - counts
    safe = step.clamp(min=1)
    table = ((step // 2 + below) // safe).clamp(max=255)
    levels = torch.arange(256, device=images.device).expand_as(table)
    return _look_up(pixels, torch.where(step == 0, levels, table)).view_as(images)


def blur(images: Tensor, values: Tensor) -> Tensor:
    """Blur by boxes of a width of their own.

    The numbers are weights at distance 0, 1 and 2, times 2**24.
    """
    for _ in range(_PASSES):
        images = _box(images, values)
    for _ in range(_PASSES):
        images = _box(images.mT, values).mT
    return images


def _box(images: Tensor, values: Tensor) -> Tensor:
    width = images.shape[3]
    place = torch.arange(-2, width + 2, device=images.device).clamp(0, width - 1)
    x = images[..., place].double()
    middle, near, far = (_each(values[:, n]) for n in range(3))
    total = middle * x[..., 2:-2] + near * (x[..., 1:-3] + x[..., 3:-1])
    total += far * (x[..., :-4] + x[..., 4:])
    result: Tensor = (total + (1 << 23)) / (1 << 24)
    return result.to(torch.uint8)


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _luma(images: Tensor) -> Tensor:
    """Return (batch, 1, height, width), uint8."""
    red, green, blue = images.int().split(1, dim=1)
    total = _RED * red + _GREEN * green + _BLUE * blue + (1 << 15)
    result: Tensor = total >> 16
    return result.to(torch.uint8)


def _blend(from_: Tensor, to: Tensor, values: Tensor) -> Tensor:
    """Go from one image, at 0, through another, at 1, and on; what follows the point is dropped."""
    start = from_.float()
    result: Tensor = start + _each(values[:, 0]).float() * (to - start)
    return result.clamp_(0, 255).to(torch.uint8)


def _look_up(pixels: Tensor, table: Tensor) -> Tensor:
    """Replace levels, (batch, 3, pixels), by those of a table, (batch, 3, 256)."""
    return table.to(torch.uint8).gather(2, pixels.long())


COLOURS: dict[str, Operation] = {
    "AutoContrast": auto_contrast,
    "Blur": blur,
    "Brightness": brightness,
    "Color": color,
    "Contrast": contrast,
    "Equalize": equalize,
    "Grey": grey,
    "Invert": invert,
    "Posterize": posterize,
    "Sharpness": sharpness,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
}
