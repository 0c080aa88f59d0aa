"""The most that a family of plans can remove before accuracy falls by more than a margin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fambav.search.family import Level
from fambav.search.space import Plan, Space
from fambav.search.subject import Subject

_ROUNDING = 1e-9  # of a difference of percentages


class Tried(NamedTuple):
    """A plan that was evaluated.

    Attributes:
        name: The number in which it differs from others of its family.
        plan: The plan.
        share: Token-layers left, 0 to 1.
        metric: The primary one of the task, on the held-out images.
        lost: How much worse than with every token.
    """

    name: str
    plan: Plan
    share: float
    metric: float
    lost: float


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was evaluated, and the answer.

    Attributes:
        answer: The largest reduction that holds the margin; None if not even the smallest does.
        trail: The model with every token, and the plans in the order of evaluation.
        plans: How many the family has.
        smallest, largest: The names of those that remove least and most.
        monotone: Whether every evaluated plan that removes less than the answer holds it too.
    """

    answer: Tried | None
    trail: tuple[Tried, ...]
    plans: int
    smallest: str
    largest: str
    monotone: bool

    @property
    def evaluated(self) -> int:
        """How many plans of the family were evaluated."""
        return len(self.trail) - 1


def tune(
    subject: Subject,
    space: Space,
    plans: Sequence[Level],
    *,
    margin: float,
    say: Callable[[Tried], None],
) -> Tuned:
    """Find the largest reduction of some that loses no more than a margin.

    Args:
        subject: The model; its held-out images are what counts.
        space: The plans of a method.
        plans: Of these, each removing more than the one before; at least one.
        margin: In units of the primary metric, such as points of top-1; 0 or more.
        say: Gets each plan as it is evaluated.
    """
    trail: list[Tried] = []
    primary = subject.task.primary

    def tried(name: str, plan: Plan) -> Tried:
        reduction = space.reduction(plan.counts)
        metric = subject.held_out(reduction).metrics[primary.name]
        lost = primary.gain(trail[0].metric, metric) if trail else 0.0
        trail.append(Tried(name, plan, reduction.schedule.share, metric, lost))
        say(trail[-1])
        return trail[-1]

    tried("every token", Plan(space.method, space.dense))
    known: dict[int, Tried] = {}

    def holds(place: int) -> bool:
        known[place] = tried(plans[place].name, Plan(space.method, plans[place].counts))
        return known[place].lost <= margin + _ROUNDING

    found = bisect(len(plans), holds)
    return Tuned(
        answer=None if found.answer is None else known[found.answer],
        trail=tuple(trail),
        plans=len(plans),
        smallest=plans[0].name,
        largest=plans[-1].name,
        monotone=found.monotone,
    )


class Bisected(NamedTuple):
    """A boundary.

    Attributes:
        answer: The last place that holds; None if there is none.
        monotone: Whether all places looked at before it hold too.
    """

    answer: int | None
    monotone: bool


def bisect(count: int, holds: Callable[[int], bool]) -> Bisected:
    """Find the last of `count` places that holds, as if none held behind one that does not.

    The place ahead of the answer and the two behind it are looked at as well: where one behind
    holds all the same it takes the answer's place, and its neighbours are looked at in turn.

    Args:
        count: 1 or more.
        holds: Of a place from 0; asked once for each.
    """
    known: dict[int, bool] = {}

    def look(place: int) -> bool:
        if place not in known:
            known[place] = holds(place)
        return known[place]

    low, high = -1, count  # low holds, or is ahead of all; high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if look(middle) else (low, middle)
    while better := [n for n in (low + 1, low + 2) if n < count and look(n)]:
        low = max(better)
    if low > 0:
        look(low - 1)
    monotone = all(held for place, held in known.items() if place <= low)
    return Bisected(None if low < 0 else low, monotone)
