"""From good plans to better ones at the same cost: crossing, mutation and selection."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fambav.search.space import Counts, Problem, at
from fambav.seeding import key

PARENTS, CHILDREN = 6, 12
CROSSED = 0.25  # share of children with two parents
STRANGE = 0.15  # share of children without any
FILLED = 0.7  # share of children that keep as many tokens as the budget has room for
TRIES = 20  # to make a child that has not been seen
PATIENCE = 5  # generations without a better plan, after which it ends


def evolve(problem: Problem, seeds: Sequence[Counts], *, seed: int, trials: int) -> Counts:
    """Improve plans until so many new ones have been tried, or no more comes of it.

    Children take their counts from two parents, move a saving from one layer to another, or are
    drawn anew; then they are brought back to the budget, and most of them give back what is left
    over.  Parents and children compete.

    Args:
        problem: What is looked for.
        seeds: Plans that meet the budget, at least one.
        seed: Of all draws.
        trials: New plans to try, 0 or more.

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


def _selected(problem: Problem, plans: list[Counts]) -> list[Counts]:
    """Return the best, the first the best of all."""
    losses = problem.losses(plans)
    ranked = sorted(zip(losses, plans, strict=True))
    return [counts for _, counts in ranked[:PARENTS]]


def _brood(
    problem: Problem, parents: list[Counts], seen: set[Counts], draw: random.Random, size: int
) -> list[Counts]:
    """Make children that have not been seen; fewer where there are hardly any left."""
    found: list[Counts] = []
    for _ in range(TRIES * size):
        if len(found) == size:
            break
        child = _child(problem, parents, draw)
        if child is not None and child not in seen:
            seen.add(child)
            found.append(child)
    return found


def _child(problem: Problem, parents: list[Counts], draw: random.Random) -> Counts | None:
    """Make a plan within the budget; None if it is not to be brought there."""
    within = _within(problem, problem.settled(_draft(problem, parents, draw)), draw)
    if within is None or draw.random() > FILLED:
        return within
    return problem.filled(within, draw.sample(range(problem.depth), problem.depth))


def _draft(problem: Problem, parents: list[Counts], draw: random.Random) -> Counts:
    """Return counts that may neither fit nor meet the budget."""
    # Better parents have more children.
    first = parents[min(draw.randrange(len(parents)), draw.randrange(len(parents)))]
    second, kind = draw.choice(parents), draw.random()
    if kind < STRANGE:
        chosen = draw.sample(range(problem.depth), draw.randint(0, min(2, problem.depth)))
        most = problem.length // 2
        return tuple(draw.randint(0, most) * (n in chosen) for n in range(problem.depth))
    if kind < STRANGE + CROSSED and second != first:
        return tuple(draw.choice(pair) for pair in zip(first, second, strict=True))
    layer = draw.choice([n for n, count in enumerate(first) if count])
    less = draw.randint(1, max(1, first[layer] // draw.choice((1, 2, 4))))
    return at(first, layer, first[layer] - less)


def _within(problem: Problem, counts: Counts, draw: random.Random) -> Counts | None:
    """Remove more tokens, at layers drawn one by one, until the budget is met."""
    for layer in draw.sample(range(problem.depth), problem.depth):
        over = problem.over(counts)
        if not over:
            break
        counts = problem.lowered(counts, layer, over) or counts
    return counts if problem.meets(counts) else None
