"""Which patches a token stands for, as arrays and as pixels.

source of each token of the start -> label of each patch -> colour of each patch -> pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fambav.pictures.walk import Ints, Walk

Pixels = NDArray[np.float64]

DROPPED = -1
_TINT = 0.65  # share of the colour where a patch is coloured
_LIFT = 0.25  # what black is raised to there, so that colours stay apart
_DARK = 0.25  # share of the image where a patch was dropped
_INK = (0.13, 0.13, 0.16)

# Okabe and Ito's colours, which people with any common kind of colour blindness tell apart; then
# the same lighter and darker.
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


def labels(source: Ints, grid: tuple[int, int], class_places: Sequence[int]) -> Ints:
    """Say which token each patch is part of.

    Args:
        source: Place now of the token that each token of the start is part of, -1 if it was
            dropped, (start length,).
        grid: Height and width of the grid of patches.
        class_places: Where the class tokens stood at the start.

    Returns:
        Numbers 0, 1, ... of the tokens in the order of their first patch, -1 where a patch was
        dropped, (height, width).

    Raises:
        ValueError: If there are not as many patches as the grid has places.
    """
    patches = np.delete(source, list(class_places))
    if len(patches) != grid[0] * grid[1]:
        raise ValueError(
            f"source has {len(patches)} patches, expected the {grid[0]} x {grid[1]} of the grid"
        )
    return _numbered(patches).reshape(grid)


def depths(walk: Walk) -> Ints:
    """Return the labels at the start and behind each layer, (depth + 1, height, width)."""
    start = np.arange(walk.start)
    sources = (start, *(step.source for step in walk.steps))
    return np.stack([labels(source, walk.grid, walk.class_places) for source in sources])


def colours(over: Ints) -> Ints:
    """Choose a colour for each patch that is part of a group at some depth.

    Patches that end in the same token have the same colour at every depth, and tokens that touch
    at the end have different ones as long as there are enough.

    Args:
        over: Labels at growing depth, (depths, height, width).

    Returns:
        Rows of `COLOURS`, -1 for a patch that was always alone, (height, width).
    """
    final = _ends(over)
    names, sizes = np.unique(final, return_counts=True)
    found = np.full(final.shape, -1)
    used = np.zeros(len(COLOURS), dtype=np.int64)
    for name in names[np.argsort(-sizes, kind="stable")]:
        mine = final == name
        if mine.sum() < 2:
            continue
        beside = np.bincount(found[_around(mine) & (found >= 0)], minlength=len(COLOURS))
        chosen = int(np.lexsort((np.arange(len(COLOURS)), used, beside))[0])
        found[mine] = chosen
        used[chosen] += 1
    return found


def painted(image: Pixels, at: Ints, colour: Ints) -> Pixels:
    """Colour the patches of groups, and darken those that were dropped.

    Args:
        image: Pixels from 0 to 1, (height, width, 3).
        at: Labels of the patches, (grid height, grid width).
        colour: Their colours, as `colours` gives them.

    Returns:
        Pixels shaped like the image.
    """
    alone = np.bincount(at[at >= 0], minlength=1) < 2
    grouped = (at >= 0) & ~alone[at]
    share = np.where(grouped, _TINT, np.where(at == DROPPED, 1 - _DARK, 0.0))
    paint = np.where(grouped[..., None], COLOURS[colour], _INK)
    down, right = (_cells(side, cells) for side, cells in zip(image.shape, at.shape, strict=False))
    where = np.ix_(down, right)
    lifted = np.where(grouped[where][..., None], _LIFT + (1 - _LIFT) * image, image)
    part = share[where][..., None]
    mixed: Pixels = lifted * (1 - part) + paint[where] * part
    return mixed


def borders(at: Ints) -> NDArray[np.float64]:
    """Return the lines between patches of different tokens, and around the image.

    Args:
        at: Labels, (height, width).

    Returns:
        Ends (x, y) of segments in units of patches from the upper left corner, (segments, 2, 2).
    """
    framed = np.pad(at, 1, constant_values=-2)
    apart = framed != np.roll(framed, 1, axis=1)
    rows, columns = np.nonzero(apart[1:-1, 1:])
    upright = [((x, y), (x, y + 1)) for y, x in zip(rows, columns, strict=True)]
    apart = framed != np.roll(framed, 1, axis=0)
    rows, columns = np.nonzero(apart[1:, 1:-1])
    level = [((x, y), (x + 1, y)) for y, x in zip(rows, columns, strict=True)]
    return np.array(upright + level, dtype=np.float64)


def links(at: Ints) -> NDArray[np.float64]:
    """Return lines that join the parts of tokens whose patches do not all touch.

    Args:
        at: Labels, (height, width).

    Returns:
        Ends (x, y), in the middle of patches, of as few and short segments as join them, in units
        of patches from the upper left corner, (segments, 2, 2).
    """
    found: list[tuple[Ints, Ints]] = []
    for name in range(at.max() + 1):
        joined, *apart = _parts(at == name)
        while apart:
            ways = [((joined[:, None] - part[None]) ** 2).sum(axis=2) for part in apart]
            nearest = int(np.argmin([way.min() for way in ways]))
            one, other = np.unravel_index(ways[nearest].argmin(), ways[nearest].shape)
            part = apart.pop(nearest)
            found.append((joined[one], part[other]))
            joined = np.concatenate((joined, part))
    return np.array(found, dtype=np.float64).reshape(-1, 2, 2)[..., ::-1] + 0.5


def fitted(image: Pixels, grid: tuple[int, ...]) -> Pixels:
    """Repeat pixels until each patch has several and patches end between pixels.

    Args:
        image: (height, width, 3).
        grid: Height and width of the grid of patches.

    Returns:
        The image, each side a multiple of the grid's, at least 8 pixels for a patch.
    """
    for axis, (side, cells) in enumerate(zip(image.shape[:2], grid, strict=True)):
        whole = math.lcm(side, cells)
        times = -(-8 * cells // whole) * (whole // side)
        image = image.repeat(times, axis=axis)
    return image


def tile(image: Pixels, at: Ints, colour: Ints, *, side: int = 160) -> NDArray[np.uint8]:
    """Paint groups with their borders at a size to look at, without a drawing library.

    Args:
        image: Pixels from 0 to 1, (height, width, 3).
        at: Labels of the patches, (grid height, grid width).
        colour: Their colours, as `colours` gives them.
        side: Least height and width of the result, in pixels.

    Returns:
        Pixels, a whole multiple of the image's size, (3, height, width).
    """
    times = -(-side // min(image.shape[:2]))
    large = painted(image.repeat(times, axis=0).repeat(times, axis=1), at, colour)
    height, width = large.shape[:2]
    whose = at[np.ix_(_cells(height, at.shape[0]), _cells(width, at.shape[1]))]
    edge = np.zeros(whose.shape, dtype=bool)
    for axis in (0, 1):
        apart = np.diff(whose, axis=axis) != 0
        edge |= np.pad(apart, [(0, 1) if axis == n else (0, 0) for n in (0, 1)])
        edge |= np.pad(apart, [(1, 0) if axis == n else (0, 0) for n in (0, 1)])
    large[edge] = 1.0
    found: NDArray[np.uint8] = np.rint(255 * large.clip(0, 1)).astype(np.uint8)
    channels_first: NDArray[np.uint8] = found.transpose(2, 0, 1)
    return channels_first


def _numbered(patches: Ints) -> Ints:
    """Number values from 0 in the order of their first appearance; -1 stays."""
    values, first, inverse = np.unique(patches, return_index=True, return_inverse=True)
    alive = values >= 0
    rank = np.full(len(values), DROPPED)
    rank[np.flatnonzero(alive)[np.argsort(first[alive])]] = np.arange(alive.sum())
    return rank[inverse]


def _ends(over: Ints) -> Ints:
    """Number the tokens in which patches end, or from which they were dropped."""
    last = (over >= 0).sum(axis=0) - 1  # a patch that was dropped stays so
    there = np.take_along_axis(over, last[None], axis=0)[0]
    ends: Ints = last * (over.max() + 1) + there
    return ends


def _parts(mine: NDArray[np.bool_]) -> list[Ints]:
    """Split patches into those that touch: rows and columns of each part, (patches, 2)."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(mine)}, []
    while left:
        part, edge = [], [min(left)]
        left -= set(edge)
        while edge:
            y, x = edge.pop()
            part.append((y, x))
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            edge += sorted(near)
        found.append(np.array(part))
    return found


def _around(mine: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the patches next to some, corners included."""
    wide = np.pad(mine, 1)
    near = np.zeros_like(mine)
    height, width = mine.shape
    for down in range(3):
        for right in range(3):
            near |= wide[down : down + height, right : right + width]
    return near & ~mine


def _cells(side: int, cells: int) -> Ints:
    """Return the patch that each of `side` pixels is in."""
    return np.arange(side) * cells // side
