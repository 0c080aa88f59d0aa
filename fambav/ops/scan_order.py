"""The orders in which a grid of tokens is scanned, and rows moved into and out of them.

    0  -> -> ->      2  | ^ |
       <- <- <-         v | v       1 and 3 are 0 and 2 from their ends
       -> -> ->

Source: Yang et al., "PlainMamba", arXiv:2403.17695, continuous 2D scanning and direction-aware
updating.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOVES = ("start", "right", "left", "up", "down")  # into a token, by number


class Orders(NamedTuple):
    """How sequences are scanned in each of several directions.

    Attributes:
        order: Place of the token that is scanned at each step, (batch or 1, directions, length),
            int64.
        rank: Step at which each token is scanned, shaped like order: its inverse.
        move: Number in `MOVES` of the move on the whole grid into the token of each step, shaped
            like order.
        raster: Places of the tokens row by row, (batch, length), int64; None if they stand so.
        skipped: Tokens gone between the token of each step and the one before it, shaped like
            order, 0 at the first step; None if none is.
    """

    order: Tensor
    rank: Tensor
    move: Tensor
    raster: Tensor | None = None
    skipped: Tensor | None = None

    @property
    def directions(self) -> int:
        """How many directions there are."""
        return self.order.shape[1]


def snakes(grid: tuple[int, int], device: torch.device) -> Orders:
    """Return the four continuous orders of a whole grid.

    Row by row from the upper left corner, every second row backwards; the same from its end;
    column by column from that corner, every second column backwards; the same from its end.

    Args:
        grid: Height and width.
        device: Where the orders are wanted.

    Returns:
        Orders of height * width tokens that stand row by row, the same for any batch.
    """
    if torch.compiler.is_compiling():  # a traced tensor must not outlive the trace
        return _snakes(grid, device)
    return _kept_snakes(grid, device)


def among(whole: Orders, position: Tensor) -> Orders:
    """Return the orders of the tokens of a grid that are left.

    Args:
        whole: Orders of the whole grid.
        position: Places on the grid, row by row, of the tokens left, distinct within a row and in
            any order, (batch, length), int64.

    Returns:
        Orders of these tokens, which are scanned one after another as on the whole grid, with the
        moves that lead into them there.
    """
    (batch, length), directions = position.shape, whole.directions
    each = position[:, None].expand(-1, directions, -1)
    step, order = whole.rank.expand(batch, -1, -1).gather(2, each).sort(dim=2)
    gone = step.diff(dim=2) - 1
    return Orders(
        order=order,
        rank=order.argsort(dim=2),
        move=whole.move.expand(batch, -1, -1).gather(2, step),
        raster=position.argsort(dim=1),
        skipped=torch.cat((gone.new_zeros(batch, directions, min(length, 1)), gone), dim=2),
    )


def spread(x: Tensor, orders: Orders) -> Tensor:
    """Bring tokens into every order: (batch, length, dim) -> (batch, directions, length, dim)."""
    out: Tensor = _Spread.apply(x, orders.order, orders.rank)
    return out


def collect(x: Tensor, orders: Orders) -> Tensor:
    """Add up what the directions give to each token, the transpose of `spread`.

    Args:
        x: In the order of each direction, (batch, directions, length, dim).
        orders: Those it is in.

    Returns:
        In the order of the tokens, (batch, length, dim).
    """
    out: Tensor = _Collect.apply(x, orders.order, orders.rank)
    return out


def by_step(x: Tensor, orders: Orders) -> Tensor:
    """Bring what each token has in each direction into its order.

    Args:
        x: In the order of the tokens, (batch, directions, length, dim).
        orders: Those that are wanted.

    Returns:
        Shaped like x, in the order of each direction.
    """
    return _permuted(x, orders.order)


def by_token(x: Tensor, orders: Orders) -> Tensor:
    """Undo `by_step`."""
    return _permuted(x, orders.rank)


def rows(x: Tensor, places: Tensor) -> Tensor:
    """Take rows of each sample.

    Args:
        x: (batch, length, dim).
        places: Along length, (batch or 1, ...), int64.

    Returns:
        (batch, ..., dim).
    """
    batch, length, dim = x.shape
    first = torch.arange(batch, device=x.device) * length
    index = first.view(-1, *[1] * (places.dim() - 1)) + places
    return x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, dim)


def _permuted(x: Tensor, places: Tensor) -> Tensor:
    directions, length = x.shape[1:3]
    first = torch.arange(directions, device=x.device)[:, None] * length
    return rows(x.flatten(1, 2), first + places)


class _Spread(torch.autograd.Function):
    """`spread`, whose gradient is a sum of permutations and needs no scattered addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
        """Take rows."""
        ctx.save_for_backward(order, rank)
        return rows(x, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradient of x."""
        _, rank = ctx.saved_tensors
        return _permuted(grad, rank).sum(dim=1), None, None


class _Collect(torch.autograd.Function):
    """`collect`, likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
        """Add up rows."""
        ctx.save_for_backward(order, rank)
        return _permuted(x, rank).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradient of x."""
        order, _ = ctx.saved_tensors
        return rows(grad, order), None, None


def _snakes(grid: tuple[int, int], device: torch.device) -> Orders:
    places = torch.arange(grid[0] * grid[1], device=device).view(grid)
    forward = torch.stack([_snake(places), _snake(places.T)])
    order = torch.stack([forward, forward.flip(1)], dim=1).flatten(0, 1)
    down, right = (x.diff(dim=1) for x in (order // grid[1], order % grid[1]))
    move = 1 * (right > 0) + 2 * (right < 0) + 3 * (down < 0) + 4 * (down > 0)
    move = torch.cat((torch.zeros_like(order[:, :1]), move), dim=1)
    return Orders(order[None], order.argsort(dim=1)[None], move[None])


def _snake(places: Tensor) -> Tensor:
    """Read a matrix row by row, every second row backwards."""
    odd = (torch.arange(len(places), device=places.device) % 2).bool()
    return torch.where(odd[:, None], places.flip(1), places).flatten()


@lru_cache(maxsize=32)
def _kept_snakes(grid: tuple[int, int], device: torch.device) -> Orders:
    with torch.inference_mode(mode=False):  # or no later gradient could be computed with them
        return _snakes(grid, device)
