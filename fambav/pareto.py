"""The Pareto front: what no other beats in both cost and value."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(
    costs: Sequence[float], values: Sequence[float], *, higher_is_better: bool = True
) -> list[int]:
    """Return the indices of the points on the front, by growing cost; of equal points the first.

    A point is on the front if no other is at least as good at no higher cost.
    """
    worth = [value if higher_is_better else -value for value in values]
    best: list[int] = []
    for number in sorted(range(len(costs)), key=lambda n: (costs[n], -worth[n], n)):
        if not best or worth[number] > worth[best[-1]]:
            best.append(number)
    return best
