"""Scan paths: in which orders sequences read a map, every row or column from its start.

    rows     -> -> ->      columns    |  |  |       -rows and -columns are these from their ends
             -> -> ->                 v  v  v

Diagonals are read from their upper ends: `diagonals`, which run down to the right, from the right
upper corner of the map to the left lower one; `antidiagonals`, which run down to the left, from the
right lower corner to the left upper one.

They are order tables, see `scan_order`: a scan with one group for each path reads a map without a
copy.

Source: Liu et al., "VMamba", arXiv:2401.10166, 2D selective scan; Cao et al., "CVMH-UNet",
arXiv:2410.05624, figure 3, for diagonals.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fambav.ops.dispatch import plain_autograd

CROSS = ("rows", "columns", "-rows", "-columns")  # VMamba's, in the order of its weights
SLANTED = ("rows", "columns", "antidiagonals", "diagonals")  # CVMH-UNet's CS2D


def _slanted(index: Tensor, direction: int) -> Tensor:
    """Read lines that run down to the right, direction 1, or to the left, direction -1."""
    rows, columns = (torch.arange(side, device=index.device) for side in index.shape)
    line = direction * rows[:, None] - columns  # equal along a line, least of the first one
    step = line * len(rows) + rows[:, None]
    return index.flatten()[step.flatten().argsort()]


_READINGS: dict[str, Callable[[Tensor], Tensor]] = {  # of a matrix of indices
    "rows": lambda index: index.flatten(),
    "columns": lambda index: index.T.flatten(),
    "antidiagonals": lambda index: _slanted(index, -1),
    "diagonals": lambda index: _slanted(index, 1),
}
PATHS = (*_READINGS, *(f"-{name}" for name in _READINGS))


def scan_paths(
    grid: tuple[int, int], device: torch.device, names: tuple[str, ...] = CROSS
) -> Tensor:
    """Return the orders in which paths read a map.

    Args:
        grid: Height and width.
        device: Of the result.
        names: Of `PATHS`.

    Returns:
        Index of the cell, row by row, at each step, (height * width, paths), int64: an order table.

    Raises:
        ValueError: If there is no such path.
    """
    for name in names:
        if name not in PATHS:
            raise ValueError(f"path is {name!r}, expected one of {', '.join(PATHS)}")
    # A traced or transformed tensor must not outlive that, nor a second trace differ from it.
    if torch.compiler.is_compiling() or plain_autograd():
        return _paths(grid, device, names)
    return _cached_paths(grid, device, names)


def kept_paths(order: Tensor, position: Tensor) -> Tensor:
    """Return the orders in which paths read the kept cells of a map, as they come on the whole map.

    Args:
        order: Of the whole map, (length, paths).
        position: Raster indices of the kept cells, distinct within a sample and in any order,
            (batch, kept), int64.

    Returns:
        Orders of the kept cells, by their indices in `position`, (batch, kept, paths).
    """
    return order.argsort(dim=0)[position].argsort(dim=1)


def _paths(grid: tuple[int, int], device: torch.device, names: tuple[str, ...]) -> Tensor:
    index = torch.arange(grid[0] * grid[1], device=device).view(grid)
    each = [_READINGS[name.removeprefix("-")](index) for name in names]
    each = [
        read.flip(0) if name.startswith("-") else read
        for name, read in zip(names, each, strict=True)
    ]
    return torch.stack(each, dim=1)  # (length, paths)


@lru_cache(maxsize=64)
def _cached_paths(grid: tuple[int, int], device: torch.device, names: tuple[str, ...]) -> Tensor:
    with torch.inference_mode(mode=False):  # or no later gradient could be computed with them
        return _paths(grid, device, names)
