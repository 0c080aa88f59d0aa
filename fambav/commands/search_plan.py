"""fambav search-plan."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fambav.commands.output import check_files, print_line, write
from fambav.commands.parser import Parser, count, natural, number
from fambav.commands.trained import (
    RUN,
    read_settings,
    reduction_arguments,
    refuse_method,
)
from fambav.config import OPTIONS, ConfigError
from fambav.search.parsing import ALGORITHMS, OBJECTIVES, parse_budget
from fambav.table import Table

if TYPE_CHECKING:
    from fambav.search.baselines import Row
    from fambav.search.budget_search import SearchResult
    from fambav.search.objective import PlanScore
    from fambav.tasks import Metric

USAGE = "fambav search-plan CHECKPOINT --budget KIND:MOST [--method NAME ...] [--name value ...]"
_OPTIONS = ("images", "objective", "algorithm", "steps", "trials", "seed")
_SHOWN = 16  # plans of the front that are printed


def run(words: list[str]) -> None:
    """Find where a trained model loses least when it must cost less, without training."""
    given, rest = _parser().parse_known_args(words)
    _check(given)
    foreign, changes, policies = read_settings(given.checkpoint, rest)
    if policies and len(given.method) > 1:
        names = ", ".join(sorted(policies))
        raise ConfigError(f"{names} is set with several methods, expected one --method")
    from fambav.search.baselines import compare
    from fambav.search.budget_search import SearchOptions, search_plan
    from fambav.search.plan_file import plan_settings, write_plan
    from fambav.search.subject import opened

    begun = time.perf_counter()
    options = SearchOptions(
        budget=given.budget,
        methods=tuple(dict.fromkeys(given.method)),
        policies=reduction_arguments(given.method[0], policies),
        **{name: getattr(given, name) for name in _OPTIONS},
    )
    with opened(given.checkpoint, config=foreign, changes=changes) as trained:
        result = search_plan(trained, options, lambda line: print(line, flush=True))
        plan, space, cost_model = result.plan, result.space, result.cost_model
        cost = given.budget.format(cost_model(plan.counts))
        primary = trained.task.primary
        print(_front_text(given, result, primary))
        print(_answer_text(given, result))
        print(f"search took {time.perf_counter() - begun:.0f} s")
        rows: list[Row] = []
        if given.compare:
            rows, left_out = compare(
                lambda counts: trained.metric(space.reduction(counts)),
                space,
                cost_model,
                plan.counts,
            )
            images = len(trained.data.val)
            print(_compared_text(given, plan.method, rows, left_out, primary, images=images))
            as_trained = trained.metric(trained.reduction)
            print(f"as trained, the reference of the search: {primary.label} {as_trained:.2f}")
        if given.output is not None:
            write_plan(
                given.output,
                plan_settings(trained.config, plan, policies),
                f"{plan.method} {plan.summary()}: {cost}, found by",
                command=("fambav", "search-plan", *words),
                weights=trained.path,
            )
            print_line(f"written: {given.output}")
    if given.json is not None:
        figures = _figures(given, result, rows, primary.name)
        write(given.json, json.dumps(figures, indent=1) + "\n")


def _parser() -> Parser:
    parser = Parser("fambav search-plan", usage=USAGE, description=run.__doc__, allow_abbrev=False)
    parser.epilog = (
        "Also main.py's --data-path, --device, --threads and the like; of a file that is not ours "
        "--model, --data-set and whatever else describes it."
    )
    add, seed = parser.add_argument, number(int, OPTIONS["seed"].bounds)
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=RUN)
    add("--budget", required=True, metavar="KIND:MOST", help="token-layers:0.7, flops:0.75, ms:9")
    add("--method", nargs="+", default=["ordered"], metavar="NAME", help="ordered by default")
    add("--images", type=count, default=256, metavar="N", help="of the training set (256)")
    add("--objective", choices=OBJECTIVES, default="distance")
    add("--algorithm", choices=ALGORITHMS, default="both")
    add("--steps", type=count, default=16, metavar="N", help="of greedy, to the budget (16)")
    add("--trials", type=natural, default=150, metavar="N", help="plans that evolution tries (150)")
    add("--seed", type=seed, default=0, metavar="S", help="of the images and of evolution (0)")
    add("--compare", action="store_true", help="with uniform strategies, on held-out images")
    add("--output", type=Path, metavar="FILE.yaml", help="gets the run that the plan makes")
    add("--json", type=Path, metavar="FILE", help="gets all figures")
    return parser


def _check(given: argparse.Namespace) -> None:
    """Parse the budget, and refuse flags that make no sense."""
    given.budget = parse_budget(given.budget)
    check_files(given.output, given.json)
    for method in given.method:
        refuse_method(method)


def _front_text(given: argparse.Namespace, result: SearchResult, primary: Metric) -> str:
    """Return the Pareto front, thinned to some lines."""
    front, kind = result.front, given.budget.kind
    step = max(1, -(-len(front) // _SHOWN))
    shown = [row for n, row in enumerate(front) if n % step == 0 or row[0] == result.plan]
    rows = []
    for plan, cost in shown:
        loss, metric = result.scores[plan]
        rows.append(
            (_cost(kind, cost), f"{loss:.4g}", f"{metric:.2f}", f"{plan.method} {plan.summary()}")
        )
    head = ("cost", "loss", primary.label, "plan")
    table = Table(head=head, rows=rows, names=0, sides=">>><").render("text")
    dropped = f", {len(shown)} of {len(front)}" if len(shown) < len(front) else ""
    note = "; costs other than the found plan's are not measured" if kind == "ms" else ""
    title = f"cost ({kind}) against loss on the training images{dropped}{note}"
    return f"{title}\n{table}"


def _cost(kind: str, cost: float) -> str:
    return f"{cost:.2f} ms" if kind == "ms" else f"{100 * cost:.2f}%"


def _answer_text(given: argparse.Namespace, result: SearchResult) -> str:
    budget, plan, cost_model = given.budget, result.plan, result.cost_model
    cost, unreduced = cost_model(plan.counts), cost_model(result.space.unreduced)
    beside = f" (every token: {unreduced:.2f} ms)" if budget.kind == "ms" else ""
    loss, metric = result.scores[plan]
    return (
        f"found: {plan.method} {plan.summary()}\n"
        f"  {budget.format(cost)}{beside}, at most {budget.format(budget.most)}"
        f"; loss {loss:.4g}, {metric:.2f}% of the training images right;"
        f" {len(result.scores)} plans tried"
    )


def _compared_text(
    given: argparse.Namespace,
    method: str,
    rows: list[Row],
    left_out: list[str],
    primary: Metric,
    *,
    images: int,
) -> str:
    from fambav.search.baselines import NEAR, count_beaten

    kind = given.budget.kind
    beyond = f"left out, dearer by more than {100 * NEAR:g} points: {', '.join(left_out)}"
    cells = [
        (row.name, _cost(kind, row.cost), f"{row.metric:.2f}", ",".join(map(str, row.counts)))
        for row in rows
    ]
    head = ("plan", kind, primary.label, "removed at each layer")
    won, tied, of = count_beaten(rows, primary)
    return "\n".join(
        (
            f"held-out images, {method}, without training; strategies never cost less",
            Table(head=head, rows=cells, names=1, sides=">>><").render("text"),
            *[beyond] * bool(left_out),
            f"found beats {won} of {of} uniform strategies and equals {tied}; one of the {images} "
            f"images is {100 / images:.2f} points",
        )
    )


def _figures(
    given: argparse.Namespace, result: SearchResult, rows: list[Row], metric: str
) -> dict[str, Any]:
    """Return the whole result as plain data."""

    def plain(row: Row | PlanScore) -> dict[str, Any]:
        return {metric if name == "metric" else name: x for name, x in row._asdict().items()}

    plan, cost_model = result.plan, result.cost_model
    return {
        "checkpoint": str(given.checkpoint),
        "budget": given.budget._asdict(),
        **{name: getattr(given, name) for name in _OPTIONS},
        "method": plan.method,
        "counts": list(plan.counts),
        "cost": cost_model(plan.counts),
        "unreduced_cost": cost_model(result.space.unreduced),
        "loss": result.scores[plan].loss,
        f"train_{metric}": result.scores[plan].metric,
        "tried": len(result.scores),
        "front": [
            {
                "method": each.method,
                "counts": each.counts,
                "cost": cost,
                **plain(result.scores[each]),
            }
            for each, cost in result.front
        ],
        "held_out": [plain(row) for row in rows],
    }
