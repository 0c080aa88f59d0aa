"""The plans of one method for one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fambav.layers import BackboneInfo
from fambav.reduction import Reduction, make_reduction, no_reduction

Counts = tuple[int, ...]

_ROUNDING = 1e-12  # of costs


class Plan(NamedTuple):
    """Where tokens go.

    Attributes:
        method: Name of the method.
        counts: Tokens removed at each layer; all 0 for a model that keeps every token.
    """

    method: str
    counts: Counts

    def told(self) -> str:
        """Write it as `--fusion-plan` does."""
        pairs = (f"{layer}:{count}" for layer, count in enumerate(self.counts, start=1) if count)
        return ",".join(pairs) or "every token kept"


class Space:
    """What a method can do with a model.

    Args:
        info: The model.
        method: Name of the method.
        how: Further arguments of `make_reduction`.

    Raises:
        ValueError: If the method can remove nothing anywhere in such a model.
    """

    def __init__(self, info: BackboneInfo, method: str, **how: Any) -> None:
        self.info, self.method, self.how = info, method, how
        self._made: dict[Counts, Reduction | None] = {}
        self._refuse_if_empty()

    @property
    def dense(self) -> Counts:
        """The plan that keeps every token."""
        return (0,) * self.info.depth

    def fits(self, counts: Counts) -> bool:
        """Whether a plan can be carried out, whatever the images."""
        return self._reduction(counts) is not None

    def reduction(self, counts: Counts) -> Reduction:
        """Return what carries a plan out, in evaluation mode.

        Raises:
            ValueError: If it cannot be.
        """
        found = self._reduction(counts)
        return self._make(counts) if found is None else found

    def _reduction(self, counts: Counts) -> Reduction | None:
        if counts not in self._made:
            try:
                self._made[counts] = self._make(counts)
            except ValueError:  # the layers take no such plan
                self._made[counts] = None
        return self._made[counts]

    def _make(self, counts: Counts) -> Reduction:
        if not any(counts):
            return no_reduction(self.info).eval()
        text = "list:" + ",".join(map(str, counts))
        return make_reduction(self.info, self.method, text, **self.how).eval()

    def _refuse_if_empty(self) -> None:
        """Try every number of tokens at one layer, and let the model's own words say why not."""
        layer = self.info.depth - 1
        single = [at(self.dense, layer, count) for count in range(1, self.info.tokens)]
        if not any(self.fits(counts) for counts in single):
            self._make(single[0])
            raise ValueError(f"method is {self.method!r}, expected one that removes tokens")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The plan of least loss among those that cost no more than `most`.

    Attributes:
        dense: The plan that keeps every token.
        length: More tokens than any layer can remove.
        fits: Whether a plan can be carried out.
        cost: Of a plan, in any unit.
        losses: Of some plans, in their order; many at once are cheaper than one by one.
        most: What a plan may cost.
    """

    dense: Counts
    length: int
    fits: Callable[[Counts], bool]
    cost: Callable[[Counts], float]
    losses: Callable[[Sequence[Counts]], list[float]]
    most: float

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.dense)

    def over(self, counts: Counts) -> float:
        """Return how much more than the budget a plan costs; 0 if it meets it."""
        over = self.cost(counts) - self.most
        return over if over > _ROUNDING else 0.0

    def meets(self, counts: Counts) -> bool:
        """Whether a plan can be carried out within the budget."""
        return self.fits(counts) and not self.over(counts)

    def settled(self, counts: Counts) -> Counts:
        """Lower counts, from the first layer on, until the plan can be carried out."""
        done = self.dense
        for layer, count in enumerate(counts):
            fitting = (at(done, layer, less) for less in range(count, 0, -1))
            done = next(filter(self.fits, fitting), done)
        return done

    def lowered(self, counts: Counts, layer: int, saving: float) -> Counts | None:
        """Remove more tokens at one layer, so many that the cost falls by `saving` or more.

        Later layers remove fewer where they must.

        Args:
            counts: A plan that can be carried out.
            layer: From 0.
            saving: More than 0, in the unit of the cost.

        Returns:
            The plan of the fewest tokens more; the one of least cost if none saves so much; None
            if none saves anything.
        """
        before, best, least = self.cost(counts), None, self.cost(counts)
        for more in self._raised(counts, layer):
            cost = self.cost(more)
            if cost < least:
                best, least = more, cost
            if before - cost >= saving - _ROUNDING:
                return more
        return best

    def _raised(self, counts: Counts, layer: int) -> Iterator[Counts]:
        for count in range(counts[layer] + 1, self.length):
            head = (*counts[:layer], count, *self.dense[layer + 1 :])
            if self.fits(head):
                yield self.settled((*head[: layer + 1], *counts[layer + 1 :]))

    def filled(self, counts: Counts, layers: Sequence[int]) -> Counts:
        """Keep tokens that the budget has room for, at these layers in their order.

        Args:
            counts: A plan within the budget.
            layers: From 0.
        """
        for layer in layers:
            fewer = (at(counts, layer, count) for count in range(counts[layer]))
            counts = next(filter(self.meets, fewer), counts)
        return counts

    def least(self) -> Counts:
        """Return the plan that removes as much as possible as early as possible.

        A layer where that costs more than it saves removes nothing.
        """
        counts = self.dense
        for layer in range(self.depth):
            more = (at(counts, layer, count) for count in range(self.length - 1, 0, -1))
            found = next(filter(self.fits, more), counts)
            if self.cost(found) < self.cost(counts):
                counts = found
        return counts


def at(counts: Counts, layer: int, count: int) -> Counts:
    """Return a plan with another count at a layer, from 0."""
    return (*counts[:layer], count, *counts[layer + 1 :])
