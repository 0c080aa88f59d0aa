"""The interface of every reduction method, and what is done with the tokens it chooses.

    tokens -> reducer: which go, and where to -> merge: group means -> fewer tokens

A reducer is a class with `limit` and `reduce`, registered by name; its `reduce` makes a
`Selection` and hands it to `merge`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

from torch import Tensor, nn

from fambav.layers import Tokens
from fambav.ops.match import Selection
from fambav.ops.pool import pool
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
    pooled = pool(tokens.x, tokens.residual, weight, tokens.size, selection)
    return Tokens(
        x=pooled.x,
        residual=pooled.residual,
        size=pooled.size,
        position=tokens.position.gather(1, selection.keep),
        class_places=pooled.place.gather(1, tokens.class_places),
        source=None if tokens.source is None else pooled.place.gather(1, tokens.source),
    )
