"""The largest reduction of a family of plans that keeps accuracy within a margin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from fambav.arguments import is_number, refusal
from fambav.reduction import Reduction, StagedReduction
from fambav.reduction.schedule import parse_schedule
from fambav.reduction.schedule import plan as strategy_plan
from fambav.search.parsing import Family
from fambav.search.space import Counts, Plan, SearchSpace
from fambav.tasks import Metric

Member = tuple[str, Counts]  # the number in which it differs from others, and the plan

_ROUNDING = 1e-9  # of a difference of percentages
_PERCENT = 100


class Evaluated(NamedTuple):
    """A plan on the held-out images.

    Attributes:
        name: The number in which it differs from others of its family.
        plan: The plan.
        share: Token-layers that remain, 0 to 1.
        metric: The primary one of the task.
        lost: How much worse than as trained.
    """

    name: str
    plan: Plan
    share: float
    metric: float
    lost: float


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The result of tuning.

    Attributes:
        answer: The largest reduction within the margin; None if not even the smallest is.
        trail: The model as trained, with every token if that differs, and the plans in the order
            of evaluation.
        evaluated: How many of these plans are of the family.
        monotone: Whether every evaluated plan that removes less than the answer is within it too.
    """

    answer: Evaluated | None
    trail: tuple[Evaluated, ...]
    evaluated: int
    monotone: bool


def tune(
    metric: Callable[[Reduction | StagedReduction], float],
    space: SearchSpace,
    members: Sequence[Member],
    *,
    trained: Reduction | StagedReduction,
    primary: Metric,
    margin: float,
    report: Callable[[Evaluated], None],
) -> Tuned:
    """Find the largest reduction that loses no more than a margin.

    Args:
        metric: The primary one under a reduction on the held-out images.
        space: The plans of a method.
        members: Of these, each removing more than the one before; at least one.
        trained: What the model was trained with, the reference.
        primary: That metric.
        margin: In its unit, such as points of top-1; 0 or more.
        report: Gets each plan as it is evaluated.

    Raises:
        ValueError: If there is no such margin.
    """
    if not is_number(margin) or not 0 <= margin < math.inf:
        raise refusal("margin", margin, "a number of 0 or more")
    trail: list[Evaluated] = []

    def evaluate(name: str, method: str, reduction: Reduction | StagedReduction) -> Evaluated:
        value, schedule = metric(reduction), reduction.schedule
        lost = primary.gain(trail[0].metric, value) if trail else 0.0
        plan = Plan(method, schedule.counts, space.names)
        trail.append(Evaluated(name, plan, schedule.share, value, lost))
        report(trail[-1])
        return trail[-1]

    if trained.schedule.removed:
        evaluate("as trained", trained.name, trained)
    evaluate("every token", space.method, space.reduction(space.unreduced))
    known: dict[int, Evaluated] = {}

    def holds(index: int) -> bool:
        name, counts = members[index]
        known[index] = evaluate(name, space.method, space.reduction(counts))
        return known[index].lost <= margin + _ROUNDING

    last, monotone = bisect(len(members), holds)
    answer = None if last is None else known[last]
    return Tuned(answer=answer, trail=tuple(trail), evaluated=len(known), monotone=monotone)


def bisect(count: int, holds: Callable[[int], bool]) -> tuple[int | None, bool]:
    """Find the last of `count` indices that holds, as if none held beyond one that does not.

    The index before the answer and the two after it are tested as well: where one after it holds
    all the same it becomes the answer, and its neighbours are tested in turn.

    Args:
        count: 1 or more.
        holds: Of an index from 0; called once for each.

    Returns:
        The last index that holds, None if there is none; and whether all tested indices before it
        hold too.
    """
    known: dict[int, bool] = {}

    def test(index: int) -> bool:
        if index not in known:
            known[index] = holds(index)
        return known[index]

    low, high = -1, count  # low holds, or precedes all; high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if test(middle) else (low, middle)
    while better := [n for n in (low + 1, low + 2) if n < count and test(n)]:
        low = max(better)
    if low > 0:
        test(low - 1)
    monotone = all(held for index, held in known.items() if index <= low)
    return None if low < 0 else low, monotone


def members_of(family: Family, space: SearchSpace) -> list[Member]:
    """Return the plans that can be carried out, each removing more than the one before.

    Raises:
        ValueError: If the model lacks a layer or such strategies, or no plan can be carried out.
    """
    names: dict[Counts, str] = {}
    for name, counts in _members(family, space):
        if any(counts) and space.fits(counts):
            names.setdefault(counts, name)
    if not names:
        raise ValueError(
            f"family is {family.text!r}, expected one of which {space.method} can carry out a plan"
        )
    ordered = sorted(names, key=lambda counts: -space.reduction(counts).schedule.share)
    return [(names[counts], counts) for counts in ordered]


def _members(family: Family, space: SearchSpace) -> Iterator[Member]:
    """Yield plans, of which some may not fit and some may be equal."""
    _, kind, rest = family
    depth, patches = len(space.unreduced), space.length - len(space.info.cls_index)
    parse = partial(parse_schedule, info=space.info)
    removals = range(1, space.length)
    if kind == "keep":
        for percent in range(_PERCENT - 1, 0, -1):
            if patches * (_PERCENT - percent) >= _PERCENT:  # else no patch goes
                share = f"{percent / _PERCENT:g}"
                yield f"keep {share}", parse(f"keep:{share}@{rest}")
    elif kind == "r":
        yield from ((f"r {count}", parse(f"r:{count}@{rest}")) for count in removals)
    elif kind == "scale":
        weights = [int(weight) for weight in rest.split(",")]
        if len(weights) != depth or not any(weights):
            raise ValueError(
                f"family is {family.text!r}, expected {depth} counts, one for each layer, not all 0"
            )
        most = max(weights)
        for count in removals:  # of the largest weight, the others rounded to the nearest
            scaled = tuple((2 * weight * count + most) // (2 * most) for weight in weights)
            yield f"scale {count / most:.3g}", scaled
    else:
        yield from _of_strategy(family, space)


def _of_strategy(family: Family, space: SearchSpace) -> Iterator[Member]:
    """Yield the plans of a strategy, of which some may not fit."""
    _, kind, rest = family
    if space.info.staged:
        plans = dict(space.strategies()).get(kind)
        if plans is None:
            raise ValueError(
                f"family is {family.text!r}, expected all, interleaved, r@2.1-2.4, keep@1.1,2.1 or"
                f" scale on a model of stages, {space.info.family}"
            )
        yield from ((f"{kind} {count}", counts) for count, counts in enumerate(plans, start=1))
        return
    depth, layer = space.info.depth, int(rest) if rest else None
    if layer is not None and not 1 <= layer <= depth:
        raise ValueError(f"family is {family.text!r}, expected a layer from 1 to {depth}")
    for count in range(1, space.length):
        yield f"r {count}", strategy_plan(kind, depth=depth, count=count, layer=layer)
