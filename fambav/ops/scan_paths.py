"""Scan paths: in which orders sequences read a map, every row or column from its start.

    rows     -> -> ->      columns    |  |  |       -rows and -columns are these from their ends
             -> -> ->                 v  v  v

Diagonals are read from their upper ends: `diagonals`, which run down to the right, from the right
upper corner of the map to the left lower one; `antidiagonals`, which run down to the left, from the
right lower corner to the left upper one.

Features of several paths are kept side by side, (batch, length, paths, dim), so that a scan with
one group for each path reads them without a copy.  All gradients are permutations too: no scatter.

Source: Liu et al., "VMamba", arXiv:2401.10166, 2D selective scan; Cao et al., "CVMH-UNet",
arXiv:2410.05624, figure 3, for diagonals.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fambav.ops.cross_scan import select_rows
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


class ScanPaths(NamedTuple):
    """Orders of the cells of a map, (1, length, paths), int64.

    Of kept cells alone, the tables are those of each sample, (batch, kept, paths).

    Attributes:
        order: Index of the cell at each step, row by row.
        there: Index of the pair (cell, path) that each pair (step, path) reads.
        back: Its inverse: of the pair (step, path) at which each pair (cell, path) is read.
    """

    order: Tensor
    there: Tensor
    back: Tensor


def scan_paths(
    grid: tuple[int, int], device: torch.device, names: tuple[str, ...] = CROSS
) -> ScanPaths:
    """Return the orders in which paths read a map.

    Args:
        grid: Height and width.
        device: Of the result.
        names: Of `PATHS`.

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


def kept_paths(paths: ScanPaths, position: Tensor) -> ScanPaths:
    """Return the orders in which paths read the kept cells of a map, as they come on the whole map.

    Args:
        paths: Of the whole map.
        position: Raster indices of the kept cells, distinct within a sample and in any order,
            (batch, kept), int64.

    Returns:
        Orders of the kept cells, by their indices in `position`, (batch, kept, paths).
    """
    number = paths.order.shape[2]
    step = (paths.back // number)[0][position]  # (batch, kept, paths), of the whole map
    order = step.argsort(dim=1)
    path = torch.arange(number, device=position.device)
    return ScanPaths(order, *(cell * number + path for cell in (order, order.argsort(dim=1))))


def read_paths(x: Tensor, paths: ScanPaths) -> Tensor:
    """Read features of cells along every path.

    Args:
        x: Row by row, (batch, length, dim).
        paths: Of the map.

    Returns:
        Step by step, (batch, length, paths, dim), contiguous.
    """
    if plain_autograd():
        return select_rows(x, paths.order)
    out: Tensor = _Read.apply(x, *paths)
    return out


def merge_paths(x: Tensor, paths: ScanPaths) -> Tensor:
    """Sum features of steps over the paths for each cell, the transpose of `read_paths`.

    Args:
        x: Step by step, (batch, length, paths, dim).
        paths: Of the map.

    Returns:
        Row by row, (batch, length, dim).
    """
    if plain_autograd():
        return _pairs(x, paths.back).sum(dim=2)
    out: Tensor = _Merge.apply(x, *paths)
    return out


def to_steps(x: Tensor, paths: ScanPaths) -> Tensor:
    """Read features that each path has of its own, in its order.

    Args:
        x: Row by row, (batch, length, paths, dim).
        paths: Of the map.

    Returns:
        Step by step, shaped like x.
    """
    return _permute(x, paths.there, paths.back)


def to_cells(x: Tensor, paths: ScanPaths) -> Tensor:
    """Undo `to_steps`."""
    return _permute(x, paths.back, paths.there)


def _permute(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    if plain_autograd():
        return _pairs(x, index)
    out: Tensor = _Permute.apply(x, index, inverse)
    return out


def _pairs(x: Tensor, index: Tensor) -> Tensor:
    """Take pairs (cell or step, path) of x, (batch, length, paths, dim)."""
    return select_rows(x.flatten(1, 2), index)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, there: Tensor, back: Tensor) -> Tensor:
        del there
        ctx.save_for_backward(back)
        return select_rows(x, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (back,) = ctx.saved_tensors
        return _pairs(grad, back).sum(dim=2), None, None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, there: Tensor, back: Tensor) -> Tensor:
        del there
        ctx.save_for_backward(order)
        return _pairs(x, back).sum(dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return select_rows(grad, order), None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _pairs(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return _pairs(grad, inverse), None, None


def _paths(grid: tuple[int, int], device: torch.device, names: tuple[str, ...]) -> ScanPaths:
    index = torch.arange(grid[0] * grid[1], device=device).view(grid)
    each = [_READINGS[name.removeprefix("-")](index) for name in names]
    each = [
        read.flip(0) if name.startswith("-") else read
        for name, read in zip(names, each, strict=True)
    ]
    order = torch.stack(each, dim=1)  # (length, paths)
    path = torch.arange(len(names), device=device)
    rank = order.argsort(dim=0)
    return ScanPaths(order[None], *((cell * len(names) + path)[None] for cell in (order, rank)))


@lru_cache(maxsize=64)
def _cached_paths(grid: tuple[int, int], device: torch.device, names: tuple[str, ...]) -> ScanPaths:
    with torch.inference_mode(mode=False):  # or no later gradient could be computed with them
        return _paths(grid, device, names)
