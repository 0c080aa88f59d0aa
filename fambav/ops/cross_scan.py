"""Cross-scan: a grid of tokens in four scan orders, and the sum of their results.

    0  -> -> ->      2  | ^ |
       <- <- <-         v | v       1 and 3 are 0 and 2 from their ends
       -> -> ->

Source: Yang et al., "PlainMamba", arXiv:2403.17695, continuous 2D scanning and direction-aware
updating.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fambav.ops.dispatch import plain_autograd

MOVES = ("start", "right", "left", "up", "down")  # into a token, by index


class ScanOrder(NamedTuple):
    """In which order the tokens are scanned, in each of several directions.

    Attributes:
        order: Index of the token at each step, (batch or 1, directions, length), int64.
        rank: Step of each token, shaped like order: its inverse permutation.
        move: Index in `MOVES` of the move on the whole grid into the token at each step, shaped
            like order.
        raster: Indices of the tokens in raster order, (batch, length), int64; None if they are in
            it already.
        skipped: Tokens removed between the token at each step and the one before it, shaped like
            order, 0 at the first step; None if none is.
    """

    order: Tensor
    rank: Tensor
    move: Tensor
    raster: Tensor | None = None
    skipped: Tensor | None = None

    @property
    def directions(self) -> int:
        """The number of directions."""
        return self.order.shape[1]


def snake_order(grid: tuple[int, int], device: torch.device) -> ScanOrder:
    """Return the four continuous scan orders of a whole grid.

    Row by row from the upper left corner, every second row backwards; the same from its end;
    column by column from that corner, every second column backwards; the same from its end.

    Args:
        grid: Height and width.
        device: Of the result.

    Returns:
        The order of height * width tokens in raster order, the same for any batch.

    Source: Yang et al., "PlainMamba", arXiv:2403.17695, continuous 2D scanning.
    """
    # A traced or transformed tensor must not outlive that, nor a second trace differ from it.
    if torch.compiler.is_compiling() or plain_autograd():
        return _snake_order(grid, device)
    return _cached_snake_order(grid, device)


def kept_order(whole: ScanOrder, position: Tensor) -> ScanOrder:
    """Return the scan order of the tokens of a grid that are kept.

    Args:
        whole: Of the whole grid.
        position: Grid positions (raster indices) of the kept tokens, distinct within a sample and
            in any order, (batch, length), int64.

    Returns:
        These tokens in the order of the whole grid, with the moves that lead into them there.
    """
    (batch, length), directions = position.shape, whole.directions
    each = position[:, None].expand(-1, directions, -1)
    step, order = whole.rank.expand(batch, -1, -1).gather(2, each).sort(dim=2)
    removed = step.diff(dim=2) - 1  # (batch, directions, length - 1)
    first = removed.new_zeros(batch, directions, min(length, 1))
    return ScanOrder(
        order=order,
        rank=order.argsort(dim=2),
        move=whole.move.expand(batch, -1, -1).gather(2, step),
        raster=position.argsort(dim=1),
        skipped=torch.cat((first, removed), dim=2),
    )


def cross_scan(x: Tensor, order: ScanOrder) -> Tensor:
    """Permute tokens into every scan order.

    Args:
        x: In token order, (batch, length, dim).
        order: Of each direction.

    Returns:
        (batch, directions, length, dim).
    """
    if plain_autograd():
        return select_rows(x, order.order)
    out: Tensor = _CrossScan.apply(x, order.order, order.rank)
    return out


def cross_merge(x: Tensor, order: ScanOrder) -> Tensor:
    """Sum the directions for each token, the transpose of `cross_scan`.

    Args:
        x: In the scan order of each direction, (batch, directions, length, dim).
        order: Of each direction.

    Returns:
        In token order, (batch, length, dim).
    """
    if plain_autograd():
        return select_rows(x, order.rank).sum(dim=1)
    out: Tensor = _CrossMerge.apply(x, order.order, order.rank)
    return out


def to_scan_order(x: Tensor, order: ScanOrder) -> Tensor:
    """Permute what each token has in each direction into that direction's scan order.

    Args:
        x: In token order, (batch, directions, length, dim).
        order: Of each direction.

    Returns:
        Shaped like x.
    """
    return select_rows(x, order.order)


def to_token_order(x: Tensor, order: ScanOrder) -> Tensor:
    """Undo `to_scan_order`."""
    return select_rows(x, order.rank)


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """Take rows along the last axis but one.

    Args:
        x: (batch, length, dim), or (batch, directions, length, dim).
        index: Along length, int64.  Its first axes are those of x before length, or 1; any others
            follow: (batch or 1, ...) of three axes, (batch or 1, directions or 1, ...) of four.

    Returns:
        (batch, ..., dim), or (batch, directions, ..., dim).
    """
    *leading, length, dim = x.shape
    first = torch.arange(math.prod(leading), device=x.device) * length
    rows = first.view(*leading, *[1] * (index.dim() - len(leading))) + index
    # As one index over all samples: many times as fast as a gather with an index of x's width.
    return x.flatten(0, -2).index_select(0, rows.flatten()).view(*rows.shape, dim)


class _CrossScan(torch.autograd.Function):
    """`cross_scan`; its gradient sums permutations instead of scatter-adding with atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
        """Take rows."""
        ctx.save_for_backward(order, rank)
        return select_rows(x, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradient of x."""
        _, rank = ctx.saved_tensors
        return select_rows(grad, rank).sum(dim=1), None, None


class _CrossMerge(torch.autograd.Function):
    """`cross_merge`, whose gradient is `cross_scan`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
        """Sum permutations."""
        ctx.save_for_backward(order, rank)
        return select_rows(x, rank).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradient of x."""
        order, _ = ctx.saved_tensors
        return select_rows(grad, order), None, None


def _snake_order(grid: tuple[int, int], device: torch.device) -> ScanOrder:
    index = torch.arange(grid[0] * grid[1], device=device).view(grid)
    forward = torch.stack([_snake(index), _snake(index.T)])
    order = torch.stack([forward, forward.flip(1)], dim=1).flatten(0, 1)  # (directions, length)
    down, right = (x.diff(dim=1) for x in (order // grid[1], order % grid[1]))
    move = 1 * (right > 0) + 2 * (right < 0) + 3 * (down < 0) + 4 * (down > 0)
    move = torch.cat((torch.zeros_like(order[:, :1]), move), dim=1)
    return ScanOrder(order[None], order.argsort(dim=1)[None], move[None])


def _snake(index: Tensor) -> Tensor:
    """Read a matrix row by row, every second row backwards."""
    odd = (torch.arange(len(index), device=index.device) % 2).bool()
    return torch.where(odd[:, None], index.flip(1), index).flatten()


@lru_cache(maxsize=32)
def _cached_snake_order(grid: tuple[int, int], device: torch.device) -> ScanOrder:
    with torch.inference_mode(mode=False):  # or no later gradient could be computed with them
        return _snake_order(grid, device)
