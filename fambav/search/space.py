"""The plans of one method for one model, and how a plan is brought within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fambav.layers import BackboneInfo
from fambav.reduction import Reduction, make_reduction, no_reduction, write_schedule
from fambav.reduction.schedule import plan as strategy_plan

Counts = tuple[int, ...]

_ROUNDING = 1e-12  # of costs


class Plan(NamedTuple):
    """Tokens that a method removes.

    Attributes:
        method: Name of the method.
        counts: Tokens removed at each layer; all 0 for a model that keeps every token.
    """

    method: str
    counts: Counts

    def summary(self) -> str:
        """Return the plan as a schedule."""
        return write_schedule(self.counts) or "every token kept"


class SearchSpace:
    """All plans that a method can carry out in a model.

    Args:
        info: The model.
        method: Name of the method.
        policies: Further arguments of `make_reduction`.

    Attributes:
        unreduced: The plan that keeps every token.

    Raises:
        ValueError: If the method can remove nothing anywhere in such a model.
    """

    def __init__(self, info: BackboneInfo, method: str, **policies: Any) -> None:
        self.info, self.method, self.policies = info, method, policies
        self.unreduced: Counts = (0,) * info.depth
        self._reductions: dict[Counts, Reduction | None] = {}
        last = info.depth - 1
        single = [with_count(self.unreduced, last, count) for count in range(1, info.tokens)]
        if not any(map(self.fits, single)):
            self._make(with_count(self.unreduced, last, 1))  # raises the model's own reason

    def fits(self, counts: Counts) -> bool:
        """Whether a plan can be carried out, whatever the images."""
        if counts not in self._reductions:
            try:
                self._reductions[counts] = self._make(counts)
            except ValueError:
                self._reductions[counts] = None
        return self._reductions[counts] is not None

    def reduction(self, counts: Counts) -> Reduction:
        """Return the reduction that carries a plan out, in evaluation mode.

        Raises:
            ValueError: If it cannot be carried out.
        """
        known = self._reductions[counts] if self.fits(counts) else None
        return self._make(counts) if known is None else known

    def _make(self, counts: Counts) -> Reduction:
        if not any(counts):
            return no_reduction(self.info).eval()
        text = write_schedule(counts)
        return make_reduction(self.info, self.method, text, **self.policies).eval()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Minimise the loss of a plan whose cost is at most `most`.

    Attributes:
        unreduced: The plan that keeps every token.
        length: More tokens than any layer can remove.
        fits: Whether a plan can be carried out.
        cost: Of a plan, in any unit.
        losses: Of several plans, in their order; many at once take less time than one by one.
        most: What a plan may cost.
    """

    unreduced: Counts
    length: int
    fits: Callable[[Counts], bool]
    cost: Callable[[Counts], float]
    losses: Callable[[Sequence[Counts]], list[float]]
    most: float

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.unreduced)

    def excess(self, counts: Counts) -> float:
        """Return how much more than the budget a plan costs; 0 if it meets it."""
        excess = self.cost(counts) - self.most
        return excess if excess > _ROUNDING else 0.0

    def meets(self, counts: Counts) -> bool:
        """Whether a plan can be carried out within the budget."""
        return self.fits(counts) and not self.excess(counts)

    def repair(self, counts: Counts) -> Counts:
        """Lower counts, from the first layer on, until the plan can be carried out."""
        repaired = self.unreduced
        for layer, count in enumerate(counts):
            lower = (with_count(repaired, layer, less) for less in range(count, 0, -1))
            repaired = next(filter(self.fits, lower), repaired)
        return repaired

    def remove_more(self, counts: Counts, layer: int, saving: float) -> Counts | None:
        """Remove more tokens at one layer, until the cost falls by `saving` or more.

        Later layers remove fewer where they must.

        Args:
            counts: A plan that can be carried out.
            layer: From 0.
            saving: More than 0, in the unit of the cost.

        Returns:
            The plan of the fewest additional tokens; the one of least cost if none saves so much;
            None if none saves anything.
        """
        before, best, least = self.cost(counts), None, self.cost(counts)
        for count in range(counts[layer] + 1, self.length):
            head = (*counts[:layer], count)
            if not self.fits((*head, *self.unreduced[layer + 1 :])):
                continue
            more = self.repair((*head, *counts[layer + 1 :]))
            cost = self.cost(more)
            if cost < least:
                best, least = more, cost
            if before - cost >= saving - _ROUNDING:
                return more
        return best

    def use_slack(self, counts: Counts, layers: Sequence[int]) -> Counts:
        """Keep more tokens as long as the budget is met, at these layers in their order.

        Args:
            counts: A plan within the budget.
            layers: From 0.
        """
        for layer in layers:
            fewer = (with_count(counts, layer, count) for count in range(counts[layer]))
            counts = next(filter(self.meets, fewer), counts)
        return counts

    def cheapest(self) -> Counts:
        """Return the plan that removes as much as possible as early as possible.

        A layer where that costs more than it saves removes nothing.
        """
        counts = self.unreduced
        for layer in range(self.depth):
            more = (with_count(counts, layer, count) for count in range(self.length - 1, 0, -1))
            most = next(filter(self.fits, more), counts)
            if self.cost(most) < self.cost(counts):
                counts = most
        return counts


def with_count(counts: Counts, layer: int, count: int) -> Counts:
    """Return a plan with another count at a layer, from 0."""
    return (*counts[:layer], count, *counts[layer + 1 :])


def uniform_strategies(depth: int, length: int) -> Iterator[tuple[str, list[Counts]]]:
    """Yield each uniform strategy with its plans, of 1 to `length - 1` tokens at its layers."""
    strategies: list[tuple[str, int | None]] = [("all", None)]
    if depth > 1:
        strategies.append(("interleaved", None))
    strategies += [("upper", layer) for layer in range(2, depth + 1)]
    for strategy, layer in strategies:
        name = strategy if layer is None else f"{strategy}:{layer}"
        plans = [
            strategy_plan(strategy, depth=depth, count=count, layer=layer)
            for count in range(1, length)
        ]
        yield name, plans
