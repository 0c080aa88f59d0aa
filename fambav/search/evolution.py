"""Evolutionary search at a fixed budget: crossover, mutation and selection."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from fambav.search.space import Counts, Problem, with_count
from fambav.seeding import key

PARENTS, CHILDREN = 6, 12
CROSSED = 0.25  # share of children with two parents
IMMIGRANTS = 0.15  # share of children without any
FILLED = 0.7  # share of children that use the slack of the budget
TRIES = 20  # to make a child that has not been seen
PATIENCE = 5  # generations without a better plan, after which it ends


def evolve(problem: Problem, seeds: Sequence[Counts], *, seed: int, trials: int) -> Counts:
    """Improve plans until so many new ones have been evaluated, or no better ones come.

    Children take their counts from two parents, move a saving from one layer to another, or are
    drawn anew; then they are brought within the budget, and most of them use its slack. Parents and
    children compete.

    Args:
        problem: Loss, cost and budget.
        seeds: Plans that meet the budget, at least one.
        seed: Of all draws.
        trials: New plans to evaluate, 0 or more.

    Returns:
        The best plan of all, never worse than the best of the seeds.
    """
    draw = random.Random(key(seed, "evolution"))
    population = _selected(problem, list(dict.fromkeys(seeds)))
    seen, idle = set(population), 0
    while trials > 0 and idle < PATIENCE:
        children = _brood(problem, population, seen, draw, min(CHILDREN, trials))
        if not children:
            break
        trials -= len(children)
        best = population[0]
        population = _selected(problem, [*population, *children])
        idle = idle + 1 if population[0] == best else 0
    return population[0]


def initial_population(problem: Problem) -> Iterator[Counts]:
    """Yield plans that meet the budget: uniform strategies, then plans of a few full layers.

    The uniform ones remove as few tokens as that takes and use their slack at the last layers. The
    others remove all they can at one layer, then the next, until that is enough; they differ in the
    layer where that begins.
    """
    for _, plans in problem.strategies:
        first = next(filter(problem.meets, plans), None)
        if first is not None:
            yield problem.use_slack(first, range(problem.depth)[::-1])
    for start in range(problem.depth):
        counts = _within_budget(problem, problem.unreduced, range(start, problem.depth))
        if counts is not None:
            yield counts


def _selected(problem: Problem, plans: list[Counts]) -> list[Counts]:
    """Return the best, the first the best of all."""
    ranked = sorted(zip(problem.losses(plans), plans, strict=True))
    return [counts for _, counts in ranked[:PARENTS]]


def _brood(
    problem: Problem, parents: list[Counts], seen: set[Counts], draw: random.Random, size: int
) -> list[Counts]:
    """Make children that have not been seen; fewer where hardly any remain."""
    children: list[Counts] = []
    for _ in range(TRIES * size):
        if len(children) == size:
            break
        child = _child(problem, parents, draw)
        if child is not None and child not in seen:
            seen.add(child)
            children.append(child)
    return children


def _child(problem: Problem, parents: list[Counts], draw: random.Random) -> Counts | None:
    """Make a plan within the budget; None if it cannot be brought there."""
    repaired = problem.repair(_draft(problem, parents, draw))
    child = _within_budget(problem, repaired, draw.sample(range(problem.depth), problem.depth))
    if child is None or draw.random() > FILLED:
        return child
    return problem.use_slack(child, draw.sample(range(problem.depth), problem.depth))


def _draft(problem: Problem, parents: list[Counts], draw: random.Random) -> Counts:
    """Return counts that may neither fit nor meet the budget."""
    # Better parents have more children.
    first = parents[min(draw.randrange(len(parents)), draw.randrange(len(parents)))]
    second, kind = draw.choice(parents), draw.random()
    if kind < IMMIGRANTS:
        chosen = draw.sample(range(problem.depth), draw.randint(0, min(2, problem.depth)))
        most = problem.length // 2
        return tuple(draw.randint(0, most) * (n in chosen) for n in range(problem.depth))
    if kind < IMMIGRANTS + CROSSED and second != first:
        return tuple(draw.choice(pair) for pair in zip(first, second, strict=True))
    layer = draw.choice([n for n, count in enumerate(first) if count])
    less = draw.randint(1, max(1, first[layer] // draw.choice((1, 2, 4))))
    return with_count(first, layer, first[layer] - less)


def _within_budget(problem: Problem, counts: Counts, layers: Sequence[int]) -> Counts | None:
    """Remove more tokens at these layers, one by one, until the budget is met; None if never."""
    for layer in layers:
        excess = problem.excess(counts)
        if not excess:
            break
        counts = problem.remove_more(counts, layer, excess) or counts
    return counts if problem.meets(counts) else None
