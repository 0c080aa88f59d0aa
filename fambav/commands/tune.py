"""fambav tune."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fambav.commands.output import check_files, print_line, write
from fambav.commands.parser import Parser, number
from fambav.commands.trained import (
    RUN,
    read_settings,
    reduction_arguments,
    refuse_method,
)
from fambav.config.setting import NOT_NEGATIVE
from fambav.search.parsing import FAMILIES, parse_family

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fambav.search.tuning import Evaluated, Member, Tuned
    from fambav.tasks import Metric

USAGE = "fambav tune CHECKPOINT --margin POINTS [--method NAME] [--family PLANS] [--name value ...]"


def run(words: list[str]) -> None:
    """Find how many tokens a trained model can do without before accuracy falls by a margin."""
    given, rest = _parser().parse_known_args(words)
    refuse_method(given.method)
    check_files(given.output, given.json)
    family = parse_family(given.family)
    foreign, changes, policies = read_settings(given.checkpoint, rest)
    from fambav.search.plan_file import plan_settings, write_plan
    from fambav.search.space import SearchSpace
    from fambav.search.subject import opened
    from fambav.search.tuning import members_of, tune

    with opened(given.checkpoint, config=foreign, changes=changes) as trained:
        arguments = reduction_arguments(given.method, policies)
        space = SearchSpace(trained.net.info, given.method, **arguments)
        members, images = members_of(family, space), len(trained.data.val)
        print(f"{given.method} {family.text} on the {images} held-out images", flush=True)
        primary = trained.task.primary
        print(f"{'plan':>12}  {'token-layers':>12}  {primary.label:>7}  {'lost':>6}")
        tuned = tune(
            trained.metric,
            space,
            members,
            trained=trained.reduction,
            primary=primary,
            margin=given.margin,
            report=lambda row: print(_line(row), flush=True),
        )
        print(_result_text(given, tuned, members))
        if given.json is not None:
            write(given.json, json.dumps(_figures(given, tuned, primary), indent=1) + "\n")
        best = tuned.answer
        if given.output is not None and best is not None:
            write_plan(
                given.output,
                plan_settings(trained.config, best.plan, policies),
                f"{given.method} {best.plan.summary()}: {100 * best.share:.2f}% of token-layers, "
                f"{best.lost:.3f} points lost; chosen on the held-out images by",
                command=("fambav", "tune", *words),
                weights=trained.path,
            )
            print_line(f"written: {given.output}")
        elif given.output is not None:
            print_line(f"not written: {given.output}, since there is no plan to write")


def _parser() -> Parser:
    parser = Parser("fambav tune", usage=USAGE, description=run.__doc__, allow_abbrev=False)
    parser.epilog = (
        "Also main.py's --data-path, --device, --threads and the like; of a file that is not ours "
        "--model, --data-set and whatever else describes it."
    )
    add, margin = parser.add_argument, number(float, NOT_NEGATIVE)
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=RUN)
    add("--margin", type=margin, required=True, metavar="POINTS", help="of top-1, in percent")
    add("--method", default="ordered", metavar="NAME", help="ordered by default")
    add("--family", default="all", metavar="PLANS", help=f"{FAMILIES}; all by default")
    add("--output", type=Path, metavar="FILE.yaml", help="gets the run that the answer makes")
    add("--json", type=Path, metavar="FILE", help="gets all figures")
    return parser


def _line(row: Evaluated) -> str:
    return f"{row.name:>12}  {100 * row.share:11.2f}%  {row.metric:7.3f}  {row.lost:6.3f}"


def _result_text(given: argparse.Namespace, tuned: Tuned, members: Sequence[Member]) -> str:
    """Return the answer with what qualifies it."""
    method, margin, best = given.method, f"{given.margin:g} points", tuned.answer
    (smallest, _), (largest, _) = members[0], members[-1]
    if best is None:
        return (
            f"no answer: even the smallest reduction, {smallest}, loses more than {margin} "
            "(measured, as are those beside it)"
        )
    lines = [
        f"answer: {method} {best.name}, {best.plan.summary()}: {100 * best.share:.2f}% of "
        f"token-layers, {best.lost:.3f} points lost of {margin} allowed",
    ]
    if best.name == largest:
        lines.append(f"it is the largest that {method} can carry out in this family")
    lines.append(
        f"{tuned.evaluated} of {len(members)} plans were evaluated, with the two behind the "
        "answer; "
        + (
            "among them accuracy held up to the answer and not behind it"
            if tuned.monotone
            else "accuracy is not monotone: one that removes less than the answer does not hold"
        )
    )
    lines.append(
        "the held-out images were used to choose: the accuracy on them is no estimate for others"
    )
    return "\n".join(lines)


def _figures(given: argparse.Namespace, tuned: Tuned, primary: Metric) -> dict[str, Any]:
    """Return the whole result as plain data."""

    def plain(row: Evaluated) -> dict[str, Any]:
        return {
            "name": row.name,
            "counts": list(row.plan.counts),
            "token_layers": row.share,
            primary.name: row.metric,
            "lost": row.lost,
        }

    return {
        "checkpoint": str(given.checkpoint),
        "method": given.method,
        "family": given.family,
        "margin": given.margin,
        "answer": None if tuned.answer is None else plain(tuned.answer),
        "trail": [plain(row) for row in tuned.trail],
        "monotone": tuned.monotone,
    }
