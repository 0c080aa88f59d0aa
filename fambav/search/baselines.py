"""Uniform strategies as baselines of a plan, on the held-out images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fambav.search.cost_models import CostModel
from fambav.search.space import Counts, SearchSpace
from fambav.tasks import Metric

NEAR = 0.02  # cost beyond the cheapest row of upper, as a share of the unreduced model's


class Row(NamedTuple):
    """A plan on the held-out images.

    Attributes:
        name: What it is.
        counts: Tokens removed at each layer.
        cost: In the unit of the budget.
        metric: The primary one of the task.
    """

    name: str
    counts: Counts
    cost: float
    metric: float


def compare(
    metric: Callable[[Counts], float], space: SearchSpace, cost_model: CostModel, plan: Counts
) -> tuple[list[Row], list[str]]:
    """Evaluate a plan and the uniform strategies that cost as much or more, never less.

    Each strategy removes as many tokens as it can without costing less than the plan.  Of "upper"
    every first layer is tried.

    Args:
        metric: The primary one of a plan on the held-out images.
        space: The plans of its method.
        cost_model: Gives their costs.
        plan: The plan.

    Returns:
        Rows of the model with every token, the plan, and the strategies; and names of those that
        are left out, which cannot cost as little as the others of "upper", see `NEAR`.
    """
    compared: dict[str, Counts] = {"every token": space.unreduced, "found": plan}
    uppers: dict[str, Counts] = {}
    for name, plans in space.strategies():
        allowed = [c for c in plans if space.fits(c) and cost_model(c) >= cost_model(plan)]
        if allowed:
            kind = uppers if name.startswith("upper") else compared
            kind[name] = min(allowed, key=cost_model)
    least = min(map(cost_model, uppers.values()), default=0.0)
    limit = least + NEAR * cost_model(space.unreduced)
    left_out = [name for name, counts in uppers.items() if cost_model(counts) > limit]
    compared.update((name, c) for name, c in uppers.items() if name not in left_out)
    rows = [Row(name, c, cost_model(c), metric(c)) for name, c in compared.items()]
    return rows, left_out


def count_beaten(rows: list[Row], primary: Metric) -> tuple[int, int, int]:
    """Count the strategies that the plan beats, those it equals, and all of them."""
    gains = [primary.gain(rows[1].metric, row.metric) for row in rows[2:]]
    return sum(gain > 0 for gain in gains), gains.count(0), len(gains)
