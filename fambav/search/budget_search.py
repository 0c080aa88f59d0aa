"""The plan of least loss within a budget: greedy steps, evolution from there, the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fambav.arguments import known_name, whole
from fambav.pareto import pareto_front
from fambav.search.cost_models import CostModel, Stopwatch, flop_share, token_layers
from fambav.search.evolution import evolve, initial_population
from fambav.search.greedy import greedy, merged_dissimilarity, pair_similarity
from fambav.search.objective import Objective, PlanScore
from fambav.search.parsing import ALGORITHMS, OBJECTIVES, Budget
from fambav.search.space import Counts, Plan, Problem, SearchSpace
from fambav.search.subject import Subject

COMPARED = 64  # images whose tokens are compared before the search
TIMED = 32  # images of a batch whose milliseconds count
NARROWED = 5  # times that a search for milliseconds is repeated under a smaller budget

Log = Callable[[str], None]
Solution = tuple[Plan, CostModel]  # the best plan of one method


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What to search for, and how.

    Attributes:
        budget: What a plan may cost.
        methods: Names of methods, at least one.
        policies: Further arguments of `fambav.reduce`, for all of them.
        images: Number of images of the training set.
        objective: A kind of `Objective`.
        algorithm: "greedy", "evolution" from the uniform strategies, or "both", evolution from
            these and the greedy plan.
        steps: Of greedy, from every token to the budget.
        trials: Plans that evolution evaluates for each method.
        seed: Of the images and of all draws.
    """

    budget: Budget
    methods: Sequence[str]
    policies: Mapping[str, Any]
    images: int
    objective: str
    algorithm: str
    steps: int
    trials: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot be searched with.

        Raises:
            ValueError: If a number is too small or a name unknown.
        """
        whole("images", self.images, least=1)
        whole("steps", self.steps, least=1)
        whole("trials", self.trials)
        whole("seed", self.seed, most=2**63 - 1)
        known_name("objective", self.objective, OBJECTIVES)
        known_name("algorithm", self.algorithm, ALGORITHMS)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The plan of least loss, and all that were evaluated.

    Attributes:
        plan: The plan.
        space: The plans of its method.
        cost_model: Gives the cost of each of them.
        scores: Of all evaluated plans.
        front: The Pareto front of these, in falling order of cost: each plan that no other beats in
            both cost and loss, with its cost.
    """

    plan: Plan
    space: SearchSpace
    cost_model: CostModel
    scores: Mapping[Plan, PlanScore]
    front: list[tuple[Plan, float]]


def search_plan(run: Subject, options: SearchOptions, log: Log) -> SearchResult:
    """Search for the plan of least loss within a budget.

    Args:
        run: The trained model and its data.
        options: What to search for, and how.
        log: Gets a line now and then.

    Raises:
        ValueError: If no plan of any method meets the budget, there are too few images, or a
            method can do nothing with the model.
    """
    spaces = [SearchSpace(run.net.info, name, **options.policies) for name in options.methods]
    images, labels = run.calibration(options.images, seed=options.seed)
    objective = Objective(
        run.net,
        images,
        labels,
        kind=options.objective,
        reference=run.reduction,
        precision=run.precision,
    )
    log(f"judging on {len(labels)} training images, {options.objective}; none is held out")
    search = _Search(run, options, objective, images, log)
    solutions = {space: own for space in spaces if (own := search.solve(space)) is not None}
    if not solutions:
        raise ValueError(search.refusal())
    scores = objective.scores
    space = min(solutions, key=lambda space: scores[solutions[space][0]].loss)
    plan, cost_model = solutions[space]
    cost_models = {plan.method: own for plan, own in solutions.values()}
    front = plan_front(scores, cost_models)
    return SearchResult(plan=plan, space=space, cost_model=cost_model, scores=scores, front=front)


def plan_front(
    scores: Mapping[Plan, PlanScore], cost_models: Mapping[str, CostModel]
) -> list[tuple[Plan, float]]:
    """Return the plans that no other beats in both cost and loss, with their falling costs."""
    plans = sorted(plan for plan in scores if plan.method in cost_models)
    costs = [cost_models[plan.method](plan.counts) for plan in plans]
    losses = [scores[plan].loss for plan in plans]
    front = pareto_front(costs, losses, higher_is_better=False)
    return [(plans[index], costs[index]) for index in reversed(front)]


class _Search:
    """Searches the plans of one method after another, on the same images."""

    def __init__(
        self, run: Subject, options: SearchOptions, objective: Objective, images: Tensor, log: Log
    ) -> None:
        self.net, self.options, self.objective, self.log = run.net, options, objective, log
        self.stopwatch = Stopwatch(run.net, images[:TIMED], run.precision)
        similarity = pair_similarity(run.net, images[:COMPARED], run.precision)
        self.heuristic = partial(merged_dissimilarity, similarity)
        self.reachable: dict[str, float] = {}  # of each method that cannot meet the budget

    def solve(self, space: SearchSpace) -> Solution | None:
        """Return the best plan of a method within the budget; None if none is."""
        budget = self.options.budget
        if budget.kind == "ms":
            return self._solve_for_time(space)
        by_tokens = budget.kind == "token-layers"
        cost_model = token_layers(space) if by_tokens else flop_share(space, self.net)
        problem = self._problem(space, cost_model, budget.most)
        if self._out_of_reach(space, cost_model(problem.cheapest())):
            return None
        return space.plan(self._best(problem, space)), cost_model

    def refusal(self) -> str:
        """Return an error message with a budget that can be met."""
        budget = self.options.budget
        method = min(self.reachable, key=self.reachable.__getitem__)
        digits = 2 if budget.kind == "ms" else 4
        # Rounded up, so that what is written here is met.
        least = -(-self.reachable[method] * 10**digits // 1) / 10**digits
        return (
            f"budget is {budget.kind}:{budget.most:g}, expected at least {budget.kind}:{least:g}, "
            f"the least that {method} can reach"
        )

    def _out_of_reach(self, space: SearchSpace, least: float) -> bool:
        """Whether the cheapest plan of a method costs too much; log it."""
        budget = self.options.budget
        if least <= budget.most:
            return False
        self.reachable[space.method] = least
        self.log(f"{space.method}: no plan meets the budget, the least is {budget.format(least)}")
        return True

    def _problem(self, space: SearchSpace, cost_model: CostModel, most: float) -> Problem:
        return Problem(
            unreduced=space.unreduced,
            length=space.length,
            fits=space.fits,
            cost=cost_model,
            losses=partial(self.objective.losses, space),
            most=most,
            strategies=list(space.strategies()),
        )

    def _best(self, problem: Problem, space: SearchSpace) -> Counts:
        """Return the best plan that the algorithm reaches."""
        options, seeds = self.options, list(initial_population(problem))
        if options.algorithm != "evolution":
            seeds.insert(0, greedy(problem, self.heuristic, steps=options.steps)[-1])
            self._log_plan(space, "greedy", seeds[0])
        if options.algorithm == "greedy":
            return seeds[0]
        best = evolve(problem, seeds, seed=options.seed, trials=options.trials)
        self._log_plan(space, "evolution", best)
        return best

    def _log_plan(self, space: SearchSpace, algorithm: str, counts: Counts) -> None:
        (loss,), plan = self.objective.losses(space, [counts]), space.plan(counts)
        tried = f"{len(self.objective.scores)} plans tried"
        self.log(f"{plan.method}, {algorithm}: {plan.summary()}, loss {loss:.4g}, {tried}")

    def _solve_for_time(self, space: SearchSpace) -> Solution | None:
        """Search under the token-layers that should take so long, and measure the best plan.

        If it takes longer all the same, search again under fewer token-layers.
        """
        share, most = token_layers(space), self.options.budget.most
        cheapest = self._problem(space, share, 0.0).cheapest()
        full, (quickest,) = self.stopwatch.times([space.reduction(cheapest)])
        self.log(f"every token: {full:.2f} ms for {TIMED} images, the median; times are noisy")
        if full <= most:
            raise ValueError(
                f"budget is ms:{most:g}, expected less than the {full:.2f} ms of every token"
            )
        if self._out_of_reach(space, quickest):
            return None
        # As if time were linear in token-layers.
        slope = (1 - share(cheapest)) / (full - quickest)
        target = max(1 - (full - most) * slope, share(cheapest))
        for _ in range(NARROWED):
            counts = self._best(self._problem(space, share, target), space)
            full, (took,) = self.stopwatch.times([space.reduction(counts)])
            self.log(f"{space.method}: {took:.2f} ms at {100 * share(counts):.1f}% of token-layers")
            if took <= most:
                cost_model = _interpolated(share, space.unreduced, full, counts, took)
                return space.plan(counts), cost_model
            target = max(target - max((took - most) * slope, 0.01), share(cheapest))
        self._out_of_reach(space, max(quickest, took))
        return None


def _interpolated(
    share: CostModel, unreduced: Counts, full: float, counts: Counts, took: float
) -> CostModel:
    """Return milliseconds, measured with every token and of one plan, linear between and beyond."""
    measured = {counts: took, unreduced: full}
    slope = (full - took) / (1 - share(counts))
    return lambda plan: measured.get(plan, full - slope * (1 - share(plan)))
