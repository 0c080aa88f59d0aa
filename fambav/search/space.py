"""The plans of one method for one model, and how a plan is brought within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from fambav.layers import BackboneInfo
from fambav.reduction import Reduction, StagedReduction, make_any_reduction, write_schedule
from fambav.reduction.schedule import plan as strategy_plan

Counts = tuple[int, ...]
Strategy = tuple[str, list[Counts]]  # its name, and plans that remove more and more

_ROUNDING = 1e-12  # of costs


class Plan(NamedTuple):
    """Tokens that a method removes.

    Attributes:
        method: Name of the method.
        counts: Tokens removed at each layer; all 0 for a model that keeps every token.
        names: Of each layer of a model of stages; empty for others, whose layers are 1, 2, ...
    """

    method: str
    counts: Counts
    names: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return the plan as a schedule."""
        return write_schedule(self.counts, self.names) or "every token kept"


class SearchSpace:
    """All plans that a method can carry out in a model.

    Args:
        info: The model.
        method: Name of the method.
        policies: Further arguments of `make_reduction`.

    Attributes:
        unreduced: The plan that keeps every token.
        names: As of `Plan`.
        length: Tokens of the stage that has most of them.

    Raises:
        ValueError: If the method can remove nothing anywhere in such a model.
    """

    def __init__(self, info: BackboneInfo, method: str, **policies: Any) -> None:
        self.info, self.method, self.policies = info, method, policies
        ends = [0, *accumulate(stage.depth for stage in info.stages)]
        self._stages = [
            (start, end, stage.tokens)
            for stage, (start, end) in zip(info.stages, pairwise(ends), strict=True)
        ]
        self.unreduced: Counts = (0,) * ends[-1]
        self.length = max(stage.tokens for stage in info.stages)
        self._reductions: dict[Counts, Reduction | StagedReduction | None] = {}
        schedule = self.reduction(self.unreduced).schedule
        self.names = schedule.names if info.staged else ()
        self._whole = schedule.unreduced
        lasts = [end - 1 for _, end, _ in self._stages]
        if not any(map(self._acts, lasts)):
            self._make(with_count(self.unreduced, lasts[0], 1))  # raises the model's own reason

    def fits(self, counts: Counts) -> bool:
        """Whether a plan can be carried out, whatever the images."""
        return all(self._known(part) is not None for part in self._parts(counts))

    def reduction(self, counts: Counts) -> Reduction | StagedReduction:
        """Return the reduction that carries a plan out, in evaluation mode.

        Raises:
            ValueError: If it cannot be carried out.
        """
        return self._known(counts) or self._make(counts)

    def plan(self, counts: Counts) -> Plan:
        """Return a plan of the method."""
        return Plan(self.method, counts, self.names)

    def share(self, counts: Counts) -> float:
        """Return the share of token-layers that remain."""
        parts = [self.reduction(part).schedule for part in self._parts(counts)]
        saved = sum(self._whole - sum(schedule.lengths) for schedule in parts)
        return (self._whole - saved) / self._whole

    def strategies(self) -> Iterator[Strategy]:
        """Yield each uniform strategy with its plans, from those that remove least on.

        Famba-V's of one stage.  Of several, in layers where the method can act: the same share of
        its stage's tokens at all of them, at every second of a stage, at the first of each; and the
        same number at all of one stage.
        """
        if not self.info.staged:
            yield from uniform_strategies(self.info.depth, self.info.tokens)
            return
        able = [n for n in range(len(self.unreduced)) if self._acts(n)]
        stages = [[n for n in able if start <= n < end] for start, end, _ in self._stages]
        chosen = {
            "all": able,
            "interleaved": [
                n for start, end, _ in self._stages for n in range(start + 1, end, 2) if n in able
            ],
            "first": [own[0] for own in stages if own],
            **{f"stage {number}": own for number, own in enumerate(stages, start=1)},
        }
        for name, layers in chosen.items():
            if layers:
                yield name, [self._shared(layers, n) for n in range(1, self.length)]

    def _shared(self, layers: Sequence[int], number: int) -> Counts:
        """Remove this number of `length` from each stage's tokens at each of some layers."""
        return tuple(
            number * tokens // self.length if layer in layers else 0
            for start, end, tokens in self._stages
            for layer in range(start, end)
        )

    def _acts(self, layer: int) -> bool:
        """Whether the method can remove tokens at a layer, from 0, and nowhere else."""
        counts = range(1, self.length)
        return any(self.fits(with_count(self.unreduced, layer, count)) for count in counts)

    def _parts(self, counts: Counts) -> Iterator[Counts]:
        """Yield what a plan does in each stage, alone; none depends on another."""
        if len(self._stages) == 1:
            yield counts
            return
        for start, end, _ in self._stages:
            if any(own := counts[start:end]):
                yield (*self.unreduced[:start], *own, *self.unreduced[end:])

    def _known(self, counts: Counts) -> Reduction | StagedReduction | None:
        """Return the reduction of a plan, which is made once; None if it cannot be carried out."""
        if any(sum(counts[start:end]) >= tokens for start, end, tokens in self._stages):
            return None
        if counts not in self._reductions:
            try:
                self._reductions[counts] = self._make(counts)
            except ValueError:
                self._reductions[counts] = None
        return self._reductions[counts]

    def _make(self, counts: Counts) -> Reduction | StagedReduction:
        if not any(counts):
            return make_any_reduction(self.info).eval()
        text = write_schedule(counts, self.names)
        return make_any_reduction(self.info, self.method, text, **self.policies).eval()


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
        strategies: Uniform ones, from which evolution starts.
    """

    unreduced: Counts
    length: int
    fits: Callable[[Counts], bool]
    cost: Callable[[Counts], float]
    losses: Callable[[Sequence[Counts]], list[float]]
    most: float
    strategies: Sequence[Strategy]

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


def uniform_strategies(depth: int, length: int) -> Iterator[Strategy]:
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
