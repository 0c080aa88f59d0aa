"""From all tokens down: again and again the step of least loss for what it saves."""

from __future__ import annotations

from collections.abc import Callable

from fambav.search.space import Counts, Problem

Guess = Callable[[Counts, Counts], float]

PROPOSED = 8  # steps tried of those that look best, each at another layer


def greedy(
    problem: Problem, guess: Guess | None = None, *, steps: int, proposed: int = PROPOSED
) -> list[Counts]:
    """Remove tokens where it harms least until the budget is met.

    A step removes more tokens at one layer, the fewest that save their share of what must be saved.
    Of all steps the one with the least loss for its saving is taken; what the last one saves beyond
    the budget counts for nothing.

    Args:
        problem: What is looked for; some plan meets its budget.
        guess: Tells from two plans how harmful the step between them looks; without it every step
            is tried.
        steps: How many the way is divided into, at least 1; more are finer and slower.
        proposed: How many of the steps that look best are tried.

    Returns:
        The plans on the way; the last is the first that meets the budget, with what it had left
        over given back.

    Raises:
        ValueError: If no plan meets the budget.
    """
    way = [problem.dense]
    grain = problem.over(problem.dense) / steps
    while problem.over(way[-1]):
        here = way[-1]
        lower = (problem.lowered(here, layer, grain) for layer in range(problem.depth))
        found = [counts for counts in lower if counts is not None]
        if not found:
            least = problem.least()
            if problem.over(least):
                raise ValueError(f"budget is {problem.most}, expected {problem.cost(least)}")
            return [*way, problem.filled(least, range(problem.depth))]
        if guess is not None and len(found) > proposed:
            found.sort(key=lambda counts: _rate(problem, here, counts, guess(here, counts)))
            found = found[:proposed]
        loss, *losses = problem.losses([here, *found])
        rates = [
            (_rate(problem, here, counts, after - loss), counts)
            for counts, after in zip(found, losses, strict=True)
        ]
        way.append(min(rates)[1])
    return [*way[:-1], _best_filling(problem, way[-1])]


def _rate(problem: Problem, before: Counts, after: Counts, harm: float) -> float:
    """Return the harm of a step for what it saves, as far as that is wanted."""
    return harm / min(problem.cost(before) - problem.cost(after), problem.over(before))


def _best_filling(problem: Problem, counts: Counts) -> Counts:
    """Give back what is left over, at the first layers first or at the last, as is better."""
    layers = range(problem.depth)
    found = [problem.filled(counts, layers), problem.filled(counts, layers[::-1])]
    found = list(dict.fromkeys([*found, counts]))
    losses = problem.losses(found)
    return min(zip(losses, found, strict=True))[1]
