"""A plan for a budget: greedy steps, evolution from there, and the front of all that was tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fambav.reduction.schedule import plan as strategy_plan
from fambav.search.evolution import evolve
from fambav.search.greedy import greedy
from fambav.search.judge import Judge, Verdict, batched
from fambav.search.price import Clock, Price, flops, token_layers
from fambav.search.similarity import similarity, unlikeness
from fambav.search.space import Counts, Plan, Problem, Space
from fambav.search.subject import Subject
from fambav.search.written import Budget

ALGORITHMS = ("greedy", "evolution", "both")
BATCH = 128  # images that go through the tree of plans together
LOOKED_AT = 64  # images whose tokens are compared before the search
TIMED = 32  # images of a batch whose milliseconds count
NARROWED = 5  # times that a search for milliseconds is repeated under less

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to.

    Attributes:
        plan: The plan of least loss.
        space: The plans of its method.
        price: What tells the cost of a plan of that method, in `unit`.
        cost: Of the plan.
        unit: What the cost is, as in `Budget.kind`.
        dense_cost: Of the model with every token.
        verdict: On the plan.
        tried: Plans that were judged.
        front: Of all judged plans those that no other beats in both cost and loss, the dearest
            first, with their costs and verdicts.
    """

    plan: Plan
    space: Space
    price: Price
    cost: float
    unit: str
    dense_cost: float
    verdict: Verdict
    tried: int
    front: list[tuple[Plan, float, Verdict]]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How plans are looked for.

    Attributes:
        budget: What a plan may cost.
        methods: Names of methods, at least one.
        how: Further arguments of `fambav.reduce`, for all of them.
        images: Images of the training set.
        objective: As in `Judge`.
        algorithm: "greedy", "evolution" from the uniform strategies, or "both", evolution from
            these and what greedy steps found.
        steps: Of greedy, from every token to the budget.
        trials: Plans that evolution tries for each method.
        seed: Of the images and of all draws.
    """

    budget: Budget
    methods: Sequence[str]
    how: Mapping[str, Any]
    images: int
    objective: str
    algorithm: str
    steps: int
    trials: int
    seed: int


def find(subject: Subject, search: Search, say: Say) -> Found:
    """Look for the plan of least loss.

    Args:
        subject: The model.
        search: What is asked.
        say: Gets a line now and then.

    Raises:
        ValueError: If no plan of any method meets the budget, there are too few images, or a
            method can do nothing with the model.
    """
    spaces = [Space(subject.net.info, method, **search.how) for method in search.methods]
    images, labels = subject.calibration(search.images, seed=search.seed)
    judge = Judge(
        subject.net,
        batched(images, BATCH),
        labels,
        objective=search.objective,
        precision=subject.precision,
    )
    say(f"judging on {len(labels)} training images, {search.objective}; none is held out")
    seek = _Seek(subject, search, judge, images, say)
    results = [found for space in spaces if (found := seek.method(space)) is not None]
    if not results:
        raise ValueError(seek.refusal())
    counts, space, price = min(
        results, key=lambda found: judge.verdicts[Plan(found[1].method, found[0])].loss
    )
    best = Plan(space.method, counts)
    prices = {found[1].method: found[2] for found in results}
    return Found(
        plan=best,
        space=space,
        price=price,
        cost=price(counts),
        unit=search.budget.kind,
        dense_cost=price(space.dense),
        verdict=judge.verdicts[best],
        tried=len(judge.verdicts),
        front=front(judge.verdicts, prices),
    )


def front(
    verdicts: Mapping[Plan, Verdict], prices: Mapping[str, Price]
) -> list[tuple[Plan, float, Verdict]]:
    """Return the plans that no other beats in both cost and loss, the dearest first."""
    costs = {p: prices[p.method](p.counts) for p in verdicts if p.method in prices}
    found: list[tuple[Plan, float, Verdict]] = []
    for plan in sorted(costs, key=lambda plan: (costs[plan], verdicts[plan].loss, plan)):
        if not found or verdicts[plan].loss < found[-1][2].loss:
            found.append((plan, costs[plan], verdicts[plan]))
    return found[::-1]


class _Seek:
    """Seeks for one method after another, on the same images.

    Attributes:
        least: What each method that cannot meet the budget can reach.
    """

    def __init__(
        self, subject: Subject, search: Search, judge: Judge, images: Tensor, say: Say
    ) -> None:
        self.subject, self.search, self.judge, self.say = subject, search, judge, say
        self.clock = Clock(subject.net, images[:TIMED], subject.precision)
        self.alike = similarity(subject.net, images[:LOOKED_AT], subject.precision)
        self.least: dict[str, float] = {}

    def method(self, space: Space) -> tuple[Counts, Space, Price] | None:
        """Return the best plan of a method within the budget; None if none is."""
        budget = self.search.budget
        if budget.kind == "ms":
            return self._within_time(space)
        price = token_layers(space) if budget.kind == "token-layers" else None
        price = price or flops(space, self.subject.net)
        problem = self._problem(space, price, budget.most)
        if self._refused(space, price(problem.least())):
            return None
        return self._solved(problem, space), space, price

    def refusal(self) -> str:
        """Say what can be reached instead."""
        budget = self.search.budget
        method = min(self.least, key=self.least.__getitem__)
        least = self.least[method]
        digits = 2 if budget.kind == "ms" else 4
        # Rounded up, so that what is written here is met.
        reach = -(-least * 10**digits // 1) / 10**digits
        return (
            f"budget is {budget.kind}:{budget.most:g}, expected at least {budget.kind}:{reach:g}, "
            f"the least that {method} can reach"
        )

    def _refused(self, space: Space, least: float) -> bool:
        """Whether the cheapest plan of a method costs too much; say so."""
        budget = self.search.budget
        if least <= budget.most:
            return False
        self.least[space.method] = least
        self.say(f"{space.method}: no plan meets the budget, the least is {budget.told(least)}")
        return True

    def _problem(self, space: Space, price: Price, most: float) -> Problem:
        return Problem(
            dense=space.dense,
            length=space.info.tokens,
            fits=space.fits,
            cost=price,
            losses=partial(self.judge.losses, space),
            most=most,
        )

    def _solved(self, problem: Problem, space: Space) -> Counts:
        """Return the best plan that the algorithm finds."""
        search, judge = self.search, self.judge
        seeds = [*uniform(problem), *concentrated(problem)]
        if search.algorithm != "evolution":
            way = greedy(problem, partial(unlikeness, self.alike), steps=search.steps)
            seeds = [way[-1], *seeds]
            self._tell(space, "greedy", seeds[0])
        if search.algorithm == "greedy":
            return seeds[0]
        best = evolve(problem, seeds, seed=search.seed, trials=search.trials)
        judge.losses(space, [best])
        self._tell(space, "evolution", best)
        return best

    def _tell(self, space: Space, what: str, counts: Counts) -> None:
        plan = Plan(space.method, counts)
        (loss,) = self.judge.losses(space, [counts])
        tried = len(self.judge.verdicts)
        self.say(f"{space.method}, {what}: {plan.told()}, loss {loss:.4g}, {tried} plans tried")

    def _within_time(self, space: Space) -> tuple[Counts, Space, Price] | None:
        """Search under the token-layers that should take so long, and measure what is found.

        What takes longer all the same is looked for again under fewer token-layers.
        """
        share, most = token_layers(space), self.search.budget.most
        least = self._problem(space, share, 0.0).least()
        whole, (quickest,) = self.clock.times([space.reduction(least)])
        self.say(f"every token: {whole:.2f} ms for {TIMED} images, the median; times are noisy")
        if whole <= most:
            raise ValueError(
                f"budget is ms:{most:g}, expected less than the {whole:.2f} ms of every token"
            )
        if self._refused(space, quickest):
            return None
        # As if time were a line through both.
        slope = (1 - share(least)) / (whole - quickest)
        wanted = max(1 - (whole - most) * slope, share(least))
        for _ in range(NARROWED):
            counts = self._solved(self._problem(space, share, wanted), space)
            whole, (took,) = self.clock.times([space.reduction(counts)])
            self.say(f"{space.method}: {took:.2f} ms at {100 * share(counts):.1f}% of token-layers")
            if took <= most:
                known = {counts: took, space.dense: whole}
                return counts, space, self._timed(space, share, known)
            wanted = max(wanted - max((took - most) * slope, 0.01), share(least))
        self._refused(space, max(quickest, took))
        return None

    @staticmethod
    def _timed(space: Space, share: Price, known: dict[Counts, float]) -> Price:
        """Return the milliseconds of measured plans, and of others as if time were a line."""
        del space
        (near, took), (dense, whole) = known.items()
        slope = (whole - took) / (share(dense) - share(near))
        return lambda counts: known.get(counts, whole - slope * (share(dense) - share(counts)))


def uniform(problem: Problem) -> Iterator[Counts]:
    """Return the uniform strategies that meet a budget, with as few tokens removed as that takes.

    What one leaves over is given back at the last layers.
    """
    layers: list[tuple[str, int | None]] = [("upper", n) for n in range(2, problem.depth + 1)]
    interleaved: list[tuple[str, int | None]] = [("interleaved", None)]
    for strategy, layer in [("all", None), *interleaved * (problem.depth > 1), *layers]:
        plans = (
            strategy_plan(strategy, depth=problem.depth, count=count, layer=layer)
            for count in range(1, problem.length)
        )
        found = next(filter(problem.meets, plans), None)
        if found is not None:
            yield problem.filled(found, range(problem.depth)[::-1])


def concentrated(problem: Problem) -> Iterator[Counts]:
    """Return the plans that remove all they can at one layer, then the next, until that is enough.

    They differ in the layer where that begins.
    """
    for first in range(problem.depth):
        counts = problem.dense
        for layer in range(first, problem.depth):
            over = problem.over(counts)
            if over:
                counts = problem.lowered(counts, layer, over) or counts
        if problem.meets(counts):
            yield counts
