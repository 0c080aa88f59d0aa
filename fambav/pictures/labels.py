"""Names beside points, none on another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]

_AROUND = 16  # directions in which there may be room
_RADII = (0.9, 1.5, 2.2, 3.0, 4.0, 5.2, 6.6, 8.2, 10.0)  # how far away, in heights of a name


def placed(
    points: NDArray[np.float64], sizes: NDArray[np.float64], *, area: Sequence[float], mark: float
) -> Boxes:
    """Find room for a name beside each point: the nearest that touches no name, point or edge.

    Args:
        points: x and y, (points, 2).
        sizes: Width and height of their names in the same unit, (names, 2); points without a name
            stand behind those that have one.
        area: Left, lower, right and upper edge.
        mark: Side of the square that a point's mark fills.

    Returns:
        Left, lower, right and upper edge of each name, (names, 4).  Where there is no room at all,
        a name covers as few others as possible.
    """
    half = mark / 2
    marks = np.concatenate((points - half, points + half), axis=1)
    found = np.empty((0, 4))
    for point, size in zip(points, sizes, strict=False):
        options = _options(point, size, mark)
        outside = _outside(options, np.asarray(area, dtype=np.float64))
        covered = sum(_overlap(options, taken[None]) for taken in found)
        cost = 1000.0 * (outside + covered) + sum(_overlap(options, m[None]) for m in marks)
        found = np.concatenate((found, options[int(np.argmin(cost))][None]))
    return found


def _options(point: NDArray[np.float64], size: NDArray[np.float64], mark: float) -> Boxes:
    """Return boxes at growing distance around a point, the right one first."""
    width, height = size
    turn = 2 * np.pi * np.arange(_AROUND) / _AROUND
    found = []
    for radius in _RADII:
        reach = 0.5 * mark + radius * 0.5 * height
        x = point[0] + np.cos(turn) * (reach + width / 2)
        y = point[1] + np.sin(turn) * (reach + height / 2)
        found.append(
            np.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), axis=1)
        )
    return np.concatenate(found)


def _overlap(one: Boxes, other: Boxes) -> NDArray[np.float64]:
    """Return the area that boxes have in common."""
    low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
    area: NDArray[np.float64] = (high - low).clip(0).prod(axis=1)
    return area


def _outside(boxes: Boxes, area: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much of boxes is outside of an area."""
    whole: NDArray[np.float64] = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return whole - _overlap(boxes, area[None])
