"""What is found beside the uniform strategies, on the images that were held out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fambav.reduction.schedule import plan
from fambav.search.price import Price
from fambav.search.space import Counts, Space
from fambav.search.subject import Subject
from fambav.tasks import Metric

NEAR = 0.02  # dearer than the cheapest row of upper, as a share of the model's whole cost


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


def compare(subject: Subject, space: Space, price: Price, found: Counts) -> list[Row]:
    """Score a plan and the uniform strategies that cost as much or more, never less.

    Each strategy removes as many tokens as it can without costing less than the plan.  Of "upper"
    every first layer is tried whose cost comes near the least of them.

    Returns:
        The model with every token, the plan, and the strategies; those that cost more than `NEAR`
        beyond the others of their kind are left out, see `dearer`.
    """
    dense = ("every token", space.dense)
    plans = [dense, ("found", found), *_uniform(space, price, price(found))]
    primary = subject.task.primary.name
    return [
        Row(name, c, price(c), subject.held_out(space.reduction(c)).metrics[primary])
        for name, c in plans
    ]


def beaten(rows: list[Row], primary: Metric) -> tuple[int, int, int]:
    """Count the strategies that the plan beats, those it equals, and all of them."""
    gains = [primary.gain(rows[1].metric, row.metric) for row in rows[2:]]
    return sum(gain > 0 for gain in gains), gains.count(0), len(gains)


def dearer(space: Space, price: Price, found: Counts) -> list[str]:
    """Name the strategies that were left out, since they cannot cost as little as the others."""
    upper = _upper(space, price, price(found))
    return [name for name, counts in upper if not _near(price(counts), upper, price, space)]


def _uniform(space: Space, price: Price, least: float) -> Iterator[tuple[str, Counts]]:
    for strategy in ("all", "interleaved"):
        counts = _cheapest(space, price, least, strategy, None)
        if counts is not None:
            yield strategy, counts
    upper = _upper(space, price, least)
    for name, counts in upper:
        if _near(price(counts), upper, price, space):
            yield name, counts


def _upper(space: Space, price: Price, least: float) -> list[tuple[str, Counts]]:
    layers = range(2, space.info.depth + 1)
    found = ((n, _cheapest(space, price, least, "upper", n)) for n in layers)
    return [(f"upper:{n}", counts) for n, counts in found if counts is not None]


def _near(cost: float, upper: list[tuple[str, Counts]], price: Price, space: Space) -> bool:
    return cost <= min(price(counts) for _, counts in upper) + NEAR * price(space.dense)


def _cheapest(
    space: Space, price: Price, least: float, strategy: str, layer: int | None
) -> Counts | None:
    """Return the plan of a strategy that costs least, but no less than that; None without one."""
    depth = space.info.depth
    if depth < 2 and strategy == "interleaved":
        return None
    counts = (
        plan(strategy, depth=depth, count=count, layer=layer)
        for count in range(1, space.info.tokens)
    )
    fitting = [c for c in counts if space.fits(c) and price(c) >= least]
    return min(fitting, key=price, default=None)
