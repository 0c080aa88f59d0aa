"""The interface of every reduction method, and what is done with the tokens it chooses.

    tokens -> reducer: which go, and where to -> merge: group means -> fewer tokens

A reducer is a class with `limit` and `reduce`, registered by name; its `reduce` makes a
`Selection` and hands it to `merge`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fambav.layers import Tokens
from fambav.registry import REDUCERS

Places = tuple[int, ...]


class Reducer(nn.Module, ABC):
    """Removes `counts[layer]` tokens at each layer, between its norm and its mixer.

    Args:
        counts: Tokens to remove at each layer, checked by `schedule`; zeros cost nothing.
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        super().__init__()
        self.counts = counts

    def forward(self, tokens: Tokens, layer: int) -> Tokens:
        """Return `tokens` shorter by `counts[layer]`; layer counts from 0."""
        count = self.counts[layer]
        return self.reduce(tokens, count) if count else tokens

    @abstractmethod
    def reduce(self, tokens: Tokens, count: int) -> Tokens:
        """Remove `count` >= 1 tokens from every sequence, and never a class token."""

    @staticmethod
    @abstractmethod
    def limit(length: int, class_places: Places) -> int:
        """Return how many of `length` tokens can go at once, whatever their features."""

    @staticmethod
    def moved(length: int, class_places: Places, count: int) -> set[Places]:
        """Return where the class tokens may be after `count` of `length` tokens went.

        Matters only to a `limit` that looks at more than the number of class tokens.
        """
        return {class_places}

    def extra_repr(self) -> str:
        """Show the counts when a model is printed."""
        return f"counts={self.counts}"


def make_reducer(name: str, counts: tuple[int, ...]) -> Reducer:
    """Build the reducer registered as `name`.

    Raises:
        ValueError: If there is no reducer of that name.
    """
    return cast(Reducer, REDUCERS[name](counts))


class Selection(NamedTuple):
    """Which tokens one call keeps and which it folds into others, as places before the call.

    Attributes:
        keep: Tokens that stay, in their new order, (batch, length - count), int64.
        source: Tokens that disappear, (batch, count), int64; with keep, every place once.
        target: Tokens that absorb them, each in keep, (batch, count), int64; may repeat.
    """

    keep: Tensor
    source: Tensor
    target: Tensor


def merge(tokens: Tokens, selection: Selection, weight: Tensor) -> Tokens:
    """Replace every group, a kept token and the sources folded into it, by its weighted mean.

    Both streams are averaged in float32 (float64 if they are) with the same groups, and come back
    in their own dtype.  A token without sources is unchanged to the last bit.

    Args:
        tokens: Sequences of equal length.
        selection: The groups and their new order.
        weight: Weight of each token in its group, (batch, length), float32, greater than 0.

    Returns:
        Tokens shorter by count, with the sizes of a group added up.
    """
    keep, source, target = selection
    batch, length = tokens.size.shape
    kept = keep.shape[1]
    order = torch.arange(kept, device=keep.device).expand(batch, kept)
    place = torch.zeros_like(tokens.position).scatter(1, keep, order)
    into = place.gather(1, target)
    place = place.scatter(1, source, into)

    groups = _Groups(_rows(keep, length), _rows(source, length), _rows(into, kept))
    both = groups.total(torch.stack((weight, tokens.size), dim=-1).flatten(0, 1))
    total, size = both.unflatten(0, (batch, kept)).unbind(-1)
    share = weight.to(torch.promote_types(tokens.x.dtype, weight.dtype)) / total.gather(1, place)

    def pool(x: Tensor) -> Tensor:
        return cast(Tensor, _Mean.apply(x, share.flatten(), _rows(place, kept), *groups))

    return Tokens(
        x=pool(tokens.x),
        residual=None if tokens.residual is None else pool(tokens.residual),
        size=size,
        position=tokens.position.gather(1, keep),
        class_places=place.gather(1, tokens.class_places),
        source=None if tokens.source is None else place.gather(1, tokens.source),
    )


class _Groups(NamedTuple):
    """Rows of a batch laid end to end: kept, disappearing, and where the latter go afterwards."""

    keep: Tensor
    source: Tensor
    into: Tensor

    def total(self, rows: Tensor) -> Tensor:
        """Add `rows`, (batch * length, n), up within each group, in an order that is fixed."""
        moved = rows.index_select(0, self.source)
        return rows.index_select(0, self.keep).index_put_((self.into,), moved, accumulate=True)


class _Mean(torch.autograd.Function):
    """Weighted group means, whose gradient is a plain lookup: nothing is added up in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        share: Tensor,
        place: Tensor,
        keep: Tensor,
        source: Tensor,
        into: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(share, place)
        rows = x.flatten(0, 1)
        out = _scaled(rows.index_select(0, keep), share.index_select(0, keep))
        moved = _scaled(rows.index_select(0, source), share.index_select(0, source))
        out.index_put_((into,), moved, accumulate=True)
        return out.to(x.dtype).view(x.shape[0], -1, x.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        share, place = ctx.saved_tensors
        rows = _scaled(grad.flatten(0, 1).index_select(0, place), share)
        return (rows.to(grad.dtype).view(grad.shape[0], -1, grad.shape[2]), *(None,) * 5)


def _scaled(rows: Tensor, share: Tensor) -> Tensor:
    """Multiply each row by its share, at least in float32, reusing the memory of `rows`."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype).mul_(share.to(dtype)[:, None])


def _rows(places: Tensor, length: int) -> Tensor:
    """Turn places along sequences of `length`, (batch, n), into rows of (batch * length, dim)."""
    first = torch.arange(len(places), device=places.device)[:, None] * length
    return (places + first).flatten()
