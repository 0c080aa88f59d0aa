"""The patches of each token as labels, colours and pixels; needs no drawing library."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fambav.viz.trace import Ints, Pixels, TokenTrace, reducing_stages

DROPPED = -1
_TINT = 0.65  # share of the colour where a patch is coloured
_LIFT = 0.25  # what black is raised to there, so that colours stay apart
_DARK = 0.25  # share of the image where a patch was dropped
_INK = (0.13, 0.13, 0.16)
_TILES = 12  # in a strip, the start among them

# Okabe and Ito's colours, distinct with any common kind of colour blindness; then the same
# lighter and darker.
_HUES = np.array(
    [
        (0.902, 0.624, 0.000),
        (0.337, 0.706, 0.914),
        (0.000, 0.620, 0.451),
        (0.941, 0.894, 0.259),
        (0.000, 0.447, 0.698),
        (0.835, 0.369, 0.000),
        (0.800, 0.475, 0.655),
    ]
)
COLOURS: Pixels = np.concatenate([_HUES, 0.5 + 0.5 * _HUES, 0.55 * _HUES])


def labels(source: Ints, grid: tuple[int, int], cls_index: Sequence[int]) -> Ints:
    """Label each patch with its token: 0, 1, ... in the order of their first patch, or DROPPED.

    Args:
        source: Index now of the token that each token of the start is part of, -1 if it was
            dropped, (start length,).
        grid: Height and width of the grid of patches.
        cls_index: Indices of the class tokens at the start.

    Returns:
        Labels, (height, width).
    """
    patches = np.delete(source, list(cls_index))
    if len(patches) != grid[0] * grid[1]:
        raise ValueError(
            f"source has {len(patches)} patches, expected the {grid[0]} x {grid[1]} of the grid"
        )
    values, first, inverse = np.unique(patches, return_index=True, return_inverse=True)
    there = values >= 0
    number = np.full(len(values), DROPPED)
    number[np.flatnonzero(there)[np.argsort(first[there])]] = np.arange(there.sum())
    return number[inverse].reshape(grid)


def depths(trace: TokenTrace) -> Ints:
    """Return the labels at the start and behind each layer, (depth + 1, height, width)."""
    sources = (np.arange(trace.start), *(step.source for step in trace.steps))
    return np.stack([labels(source, trace.grid, trace.cls_index) for source in sources])


def colours(over: Ints) -> Ints:
    """Choose a row of `COLOURS` for each patch, -1 for one that is always alone.

    Patches that end in the same token have the same colour at every depth, and tokens that touch
    at the end have different ones as long as there are enough.  Labels at growing depth, (depths,
    height, width) -> (height, width).
    """
    last = (over >= 0).sum(axis=0) - 1  # a patch that was dropped stays so
    ends = last * (over.max() + 1) + np.take_along_axis(over, last[None], axis=0)[0]
    names, sizes = np.unique(ends, return_counts=True)
    colour = np.full(ends.shape, -1)
    used = np.zeros(len(COLOURS), dtype=np.int64)
    for name in names[sizes > 1][np.argsort(-sizes[sizes > 1], kind="stable")]:
        mine = ends == name
        beside = np.bincount(colour[_around(mine) & (colour >= 0)], minlength=len(COLOURS))
        chosen = int(np.lexsort((np.arange(len(COLOURS)), used, beside))[0])
        colour[mine] = chosen
        used[chosen] += 1
    return colour


def painted(image: Pixels, at: Ints, colour: Ints) -> Pixels:
    """Colour the patches of groups in an image of pixels from 0 to 1, darken the dropped ones."""
    grouped = (at >= 0) & (np.bincount(at[at >= 0], minlength=1) > 1)[at]
    share = np.where(grouped, _TINT, np.where(at == DROPPED, 1 - _DARK, 0.0))
    paint = np.where(grouped[..., None], COLOURS[colour], _INK)
    where = _patch_of(image.shape, at)
    lifted = np.where(grouped[where][..., None], _LIFT + (1 - _LIFT) * image, image)
    part = share[where][..., None]
    mixed: Pixels = lifted * (1 - part) + paint[where] * part
    return mixed


def borders(at: Ints) -> NDArray[np.float64]:
    """Return the lines between patches of different tokens, and around the image.

    Labels, (height, width) -> ends (x, y) of segments in units of patches, (segments, 2, 2).
    """
    framed = np.pad(at, 1, constant_values=-2)
    down, right = (framed != np.roll(framed, 1, axis=axis) for axis in (0, 1))
    upright = [((x, y), (x, y + 1)) for y, x in np.argwhere(right[1:-1, 1:])]
    level = [((x, y), (x + 1, y)) for y, x in np.argwhere(down[1:, 1:-1])]
    return np.array(upright + level, dtype=np.float64)


def links(at: Ints) -> NDArray[np.float64]:
    """Return the shortest lines that join the parts of tokens whose patches do not all touch.

    Labels, (height, width) -> ends (x, y), in the middle of patches, (segments, 2, 2).
    """
    ends: list[tuple[Ints, Ints]] = []
    for name in range(at.max() + 1):
        joined, *apart = _parts(at == name)
        while apart:
            ways = [((joined[:, None] - part[None]) ** 2).sum(axis=2) for part in apart]
            nearest = int(np.argmin([way.min() for way in ways]))
            one, other = np.unravel_index(ways[nearest].argmin(), ways[nearest].shape)
            part = apart.pop(nearest)
            ends.append((joined[one], part[other]))
            joined = np.concatenate((joined, part))
    return np.array(ends, dtype=np.float64).reshape(-1, 2, 2)[..., ::-1] + 0.5


def fitted(image: Pixels, grid: tuple[int, ...]) -> Pixels:
    """Repeat pixels, (height, width, 3), until patches end between them and have 8 a side."""
    for axis, (side, cells) in enumerate(zip(image.shape[:2], grid, strict=True)):
        whole = math.lcm(side, cells)
        times = -(-8 * cells // whole) * (whole // side)
        image = image.repeat(times, axis=axis)
    return image


def tile(image: Pixels, at: Ints, colour: Ints, *, side: int = 160) -> NDArray[np.uint8]:
    """Paint groups with their borders, at a multiple of the image's size of at least `side`.

    Returns:
        Pixels, (3, height, width).
    """
    times = -(-side // min(image.shape[:2]))
    large = painted(image.repeat(times, axis=0).repeat(times, axis=1), at, colour)
    token = at[_patch_of(large.shape, at)]
    down, right = np.diff(token, axis=0) != 0, np.diff(token, axis=1) != 0
    large[:-1][down] = large[1:][down] = 1.0
    large[:, :-1][right] = large[:, 1:][right] = 1.0
    pixels: NDArray[np.uint8] = np.rint(255 * large.clip(0, 1)).astype(np.uint8).transpose(2, 0, 1)
    return pixels


def strip(traces: Sequence[TokenTrace]) -> NDArray[np.uint8]:
    """Paint the tokens at the start and behind each layer, or 11, side by side, (3, h, w).

    Of a model of stages, that of the stages that remove tokens, which share the 12 tiles.
    """
    tiles = list[NDArray[np.uint8]]()
    for trace in (shown := reducing_stages(traces)):
        over = depths(trace)
        colour = colours(over)
        chosen = (0, *spread(len(over) - 1, share(_TILES, len(shown))))
        tiles += [tile(trace.pixels, over[layer], colour) for layer in chosen]
    room = np.full((3, tiles[0].shape[1], tiles[0].shape[2] // 20), 255, dtype=np.uint8)
    return np.concatenate([part for each in tiles for part in (each, room)][:-1], axis=2)


def share(panels: int, stages: int) -> int:
    """Return how many layers of each stage are drawn, so that their starts have room as well."""
    return max(1, panels // stages - 1)


def spread(depth: int, most: int) -> list[int]:
    """Return all layers from 1, or `most` of them spread evenly, the last one among them."""
    chosen = min(depth, most)
    return [int(layer) for layer in np.linspace(depth / chosen, depth, chosen).round()]


def _parts(mine: NDArray[np.bool_]) -> list[Ints]:
    """Split patches into those that touch: rows and columns of each part, (patches, 2)."""
    left, parts = {(int(y), int(x)) for y, x in np.argwhere(mine)}, []
    while left:
        part, edge = [], [min(left)]
        left -= set(edge)
        while edge:
            y, x = edge.pop()
            part.append((y, x))
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            edge += sorted(near)
        parts.append(np.array(part))
    return parts


def _around(mine: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the patches next to some, corners included."""
    height, width = mine.shape
    wide = np.pad(mine, 1)
    near = [wide[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    around: NDArray[np.bool_] = np.any(near, axis=0) & ~mine
    return around


def _patch_of(shape: tuple[int, ...], at: Ints) -> tuple[Ints, ...]:
    """Return the index into patches, (grid height, grid width), of every pixel of an image."""
    down, right = (
        np.arange(side) * cells // side for side, cells in zip(shape, at.shape, strict=False)
    )
    return np.ix_(down, right)
