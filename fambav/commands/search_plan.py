"""fambav search-plan."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fambav.commands.parser import Parser
from fambav.commands.trained import (
    RUN,
    read_settings,
    reduction_arguments,
    refuse_folders,
    refuse_method,
)
from fambav.config import ConfigError
from fambav.search.written import parse_budget

if TYPE_CHECKING:
    from fambav.search.compared import Row
    from fambav.search.finder import Found
    from fambav.search.subject import Subject
    from fambav.tasks import Metric

USAGE = "fambav search-plan CHECKPOINT --budget KIND:MOST [--method NAME ...] [--name value ...]"
_SHOWN = 16  # plans of the front that are printed


def run(words: list[str]) -> None:
    """Find where a trained model loses least when it must cost less, without training."""
    given, rest = _parser().parse_known_args(words)
    given.words = words
    _check(given)
    asked, changes, how = read_settings(given.checkpoint, rest)
    if how and len(given.method) > 1:
        names = ", ".join(sorted(how))
        raise ConfigError(f"{names} is set with several methods, expected one --method")
    from fambav.search import answer
    from fambav.search.compared import compare
    from fambav.search.finder import Search, find
    from fambav.search.subject import opened

    begun = time.perf_counter()
    search = Search(
        budget=given.budget,
        methods=tuple(dict.fromkeys(given.method)),
        how=reduction_arguments(given.method[0], how),
        images=given.images,
        objective=given.objective,
        algorithm=given.algorithm,
        steps=given.steps,
        trials=given.trials,
        seed=given.seed,
    )
    with opened(given.checkpoint, config=asked, changes=changes) as subject:
        found = find(subject, search, lambda line: print(line, flush=True))
        primary = subject.task.primary
        print(_front_text(found, primary))
        print(_answer_text(given, found))
        print(f"search took {time.perf_counter() - begun:.0f} s")
        rows: list[Row] = []
        if given.compare:
            rows = compare(subject, found.space, found.price, found.plan.counts)
            print(_compared_text(found, rows, primary, images=len(subject.data.val)))
        config = answer.settings(subject.config, found.plan, how)
        _write(given, config, subject, found, rows)


def _parser() -> Parser:
    parser = Parser("fambav search-plan", usage=USAGE, description=run.__doc__, allow_abbrev=False)
    parser.epilog = (
        "Also main.py's --data-path, --device, --threads and the like; of a file that is not ours "
        "--model, --data-set and whatever else describes it."
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=RUN)
    add("--budget", required=True, metavar="KIND:MOST", help="token-layers:0.7, flops:0.75, ms:9")
    add("--method", nargs="+", default=["ordered"], metavar="NAME", help="ordered by default")
    add("--images", type=int, default=256, metavar="N", help="of the training set (256)")
    add("--objective", choices=("distance", "accuracy"), default="distance")
    add("--algorithm", choices=("greedy", "evolution", "both"), default="both")
    add("--steps", type=int, default=16, metavar="N", help="of greedy, to the budget (16)")
    add("--trials", type=int, default=150, metavar="N", help="plans that evolution tries (150)")
    add("--seed", type=int, default=0, metavar="S", help="of the images and of evolution (0)")
    add("--compare", action="store_true", help="with uniform strategies, on held-out images")
    add("--output", type=Path, metavar="FILE.yaml", help="gets the run that the plan makes")
    add("--json", type=Path, metavar="FILE", help="gets all figures")
    return parser


def _check(given: argparse.Namespace) -> None:
    """Refuse flags that cannot be meant."""
    given.budget = parse_budget(given.budget)
    refuse_folders(given.output, given.json)
    for method in given.method:
        refuse_method(method)
    for name, least in (("images", 1), ("steps", 1), ("trials", 0), ("seed", 0)):
        if getattr(given, name) < least:
            raise ConfigError(f"--{name} is {getattr(given, name)}, expected at least {least}")


def _front_text(found: Found, primary: Metric) -> str:
    """Return what can be had for what, thinned to some lines."""
    front = found.front
    step = max(1, -(-len(front) // _SHOWN))
    kept = [row for n, row in enumerate(front) if n % step == 0 or row[0] == found.plan]
    head = f"{'cost':>12}  {'loss':>9}  {primary.label:>6}  plan"
    lines = [
        f"{_cost(found.unit, cost):>12}  {verdict.loss:9.4g}  {verdict.metric:6.2f}  "
        f"{plan.method} {plan.told()}"
        for plan, cost, verdict in kept
    ]
    dropped = f", {len(kept)} of {len(front)}" if len(kept) < len(front) else ""
    note = "; costs other than the found plan's are not measured" if found.unit == "ms" else ""
    title = f"cost ({found.unit}) against loss on the training images{dropped}{note}"
    return "\n".join((title, head, *lines))


def _cost(unit: str, cost: float) -> str:
    return f"{cost:.2f} ms" if unit == "ms" else f"{100 * cost:.2f}%"


def _answer_text(given: argparse.Namespace, found: Found) -> str:
    dense = "" if found.unit != "ms" else f" (every token: {found.dense_cost:.2f} ms)"
    return (
        f"found: {found.plan.method} {found.plan.told()}\n"
        f"  {given.budget.told(found.cost)}{dense}, at most {given.budget.told(given.budget.most)}"
        f"; loss {found.verdict.loss:.4g}, {found.verdict.metric:.2f}% of the training images right"
        f"; {found.tried} plans tried"
    )


def _compared_text(found: Found, rows: list[Row], primary: Metric, *, images: int) -> str:
    from fambav.search.compared import NEAR, beaten, dearer

    left_out = dearer(found.space, found.price, found.plan.counts)
    beyond = f"left out, dearer by more than {100 * NEAR:g} points: {', '.join(left_out)}"
    lines = [
        f"{row.name:>12}  {_cost(found.unit, row.cost):>10}  {row.metric:8.2f}  "
        f"{','.join(map(str, row.counts))}"
        for row in rows
    ]
    won, tied, of = beaten(rows, primary)
    return "\n".join(
        (
            f"held-out images, {found.plan.method}, without training; strategies never cost less",
            f"{'plan':>12}  {found.unit:>10}  {primary.label:>8}  removed at each layer",
            *lines,
            *[beyond] * bool(left_out),
            f"found beats {won} of {of} uniform strategies and equals {tied}; one of the {images} "
            f"images is {100 / images:.2f} points",
        )
    )


def _write(
    given: argparse.Namespace, config: Any, subject: Subject, found: Found, rows: list[Row]
) -> None:
    from fambav.search import answer

    if given.output is not None:
        remarks = (
            f"{found.plan.method} {found.plan.told()}: {given.budget.told(found.cost)}, found by",
            f"fambav search-plan {shlex.join(given.words)}",
            f"main.py --config {given.output} --eval --resume {subject.path}",
            f"main.py --config {given.output} --finetune {subject.path} --output_dir DIR",
        )
        given.output.write_text(answer.to_yaml(config, remarks), encoding="utf-8")
        print(f"written: {given.output}")
    if given.json is not None:
        given.json.write_text(
            json.dumps(_figures(given, found, rows, subject.task.primary.name), indent=1) + "\n"
        )


def _figures(
    given: argparse.Namespace, found: Found, rows: list[Row], metric: str
) -> dict[str, Any]:
    """Return all that was found, as plain data."""
    return {
        "checkpoint": str(given.checkpoint),
        "budget": {"kind": given.budget.kind, "most": given.budget.most},
        "images": given.images,
        "objective": given.objective,
        "algorithm": given.algorithm,
        "steps": given.steps,
        "trials": given.trials,
        "seed": given.seed,
        "method": found.plan.method,
        "counts": list(found.plan.counts),
        "cost": found.cost,
        "dense_cost": found.dense_cost,
        "loss": found.verdict.loss,
        f"train_{metric}": found.verdict.metric,
        "tried": found.tried,
        "front": [
            {
                "method": plan.method,
                "counts": list(plan.counts),
                "cost": cost,
                "loss": verdict.loss,
                metric: verdict.metric,
            }
            for plan, cost, verdict in found.front
        ],
        "held_out": [
            {"name": row.name, "counts": list(row.counts), "cost": row.cost, metric: row.metric}
            for row in rows
        ],
    }
