"""fambav tune."""

from __future__ import annotations

import argparse
import json
import math
import shlex
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
from fambav.search.written import FAMILIES, parse_family

if TYPE_CHECKING:
    from fambav.config import Config
    from fambav.search.tuning import Tried, Tuned
    from fambav.tasks import Metric

USAGE = "fambav tune CHECKPOINT --margin POINTS [--method NAME] [--family PLANS] [--name value ...]"


def run(words: list[str]) -> None:
    """Find how many tokens a trained model can do without before accuracy falls by a margin."""
    given, rest = _parser().parse_known_args(words)
    given.words = words
    if not 0 <= given.margin < math.inf:
        raise ConfigError(f"--margin is {given.margin:g}, expected 0 or more percentage points")
    refuse_method(given.method)
    refuse_folders(given.output, given.json)
    given.family = parse_family(given.family)
    asked, changes, how = read_settings(given.checkpoint, rest)
    from fambav.search import answer
    from fambav.search.family import levels
    from fambav.search.space import Space
    from fambav.search.subject import opened
    from fambav.search.tuning import tune

    with opened(given.checkpoint, config=asked, changes=changes) as subject:
        space = Space(subject.net.info, given.method, **reduction_arguments(given.method, how))
        plans, count = levels(given.family, space), len(subject.data.val)
        print(f"{given.method} {given.family.told()} on the {count} held-out images", flush=True)
        print(f"{'plan':>12}  {'token-layers':>12}  {subject.task.primary.label:>7}  {'lost':>6}")

        def say(tried: Tried) -> None:
            print(_line(tried), flush=True)

        found = tune(subject, space, plans, margin=given.margin, say=say)
        print(_told(given, found))
        if given.json is not None:
            given.json.write_text(
                json.dumps(_figures(given, found, subject.task.primary), indent=1) + "\n"
            )
        if given.output is not None and found.answer is not None:
            config = answer.settings(subject.config, found.answer.plan, how)
            given.output.write_text(_yaml(given, config, found.answer, subject.path))
            print(f"written: {given.output}")
        elif given.output is not None:
            print(f"not written: {given.output}, since there is no plan to write")


def _parser() -> Parser:
    parser = Parser("fambav tune", usage=USAGE, description=run.__doc__, allow_abbrev=False)
    parser.epilog = (
        "Also main.py's --data-path, --device, --threads and the like; of a file that is not ours "
        "--model, --data-set and whatever else describes it."
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=RUN)
    add("--margin", type=float, required=True, metavar="POINTS", help="of top-1, in percent")
    add("--method", default="ordered", metavar="NAME", help="ordered by default")
    add("--family", default="all", metavar="PLANS", help=f"{FAMILIES}; all by default")
    add("--output", type=Path, metavar="FILE.yaml", help="gets the run that the answer makes")
    add("--json", type=Path, metavar="FILE", help="gets all figures")
    return parser


def _line(tried: Tried) -> str:
    return f"{tried.name:>12}  {100 * tried.share:11.2f}%  {tried.metric:7.3f}  {tried.lost:6.3f}"


def _told(given: argparse.Namespace, found: Tuned) -> str:
    """Return the answer, and what there is to know about it."""
    method, margin = given.method, f"{given.margin:g} points"
    if found.answer is None:
        return (
            f"no answer: even the smallest reduction, {found.smallest}, loses more than {margin} "
            "(measured, as are those beside it)"
        )
    best = found.answer
    lines = [
        f"answer: {method} {best.name}, {best.plan.told()}: {100 * best.share:.2f}% of "
        f"token-layers, {best.lost:.3f} points lost of {margin} allowed",
    ]
    if best.name == found.largest:
        lines.append(f"it is the largest that {method} can carry out in this family")
    lines.append(
        f"{found.evaluated} of {found.plans} plans were evaluated, with the two behind the answer; "
        + (
            "among them accuracy held up to the answer and not behind it"
            if found.monotone
            else "accuracy is not monotone: one that removes less than the answer does not hold"
        )
    )
    lines.append(
        "the held-out images were used to choose: the accuracy on them is no estimate for others"
    )
    return "\n".join(lines)


def _yaml(given: argparse.Namespace, config: Config, best: Tried, source: Path) -> str:
    from fambav.search import answer

    remarks = (
        f"{given.method} {best.plan.told()}: {100 * best.share:.2f}% of token-layers, "
        f"{best.lost:.3f} points lost; chosen on the held-out images by",
        f"fambav tune {shlex.join(given.words)}",
        f"main.py --config {given.output} --eval --resume {source}",
        f"main.py --config {given.output} --finetune {source} --output_dir DIR",
    )
    return answer.to_yaml(config, remarks)


def _figures(given: argparse.Namespace, found: Tuned, primary: Metric) -> dict[str, Any]:
    """Return all that was found, as plain data."""

    def plain(tried: Tried) -> dict[str, Any]:
        return {
            "name": tried.name,
            "counts": list(tried.plan.counts),
            "token_layers": tried.share,
            primary.name: tried.metric,
            "lost": tried.lost,
        }

    return {
        "checkpoint": str(given.checkpoint),
        "method": given.method,
        "family": given.family.told(),
        "margin": given.margin,
        "answer": None if found.answer is None else plain(found.answer),
        "trail": [plain(tried) for tried in found.trail],
        "monotone": found.monotone,
    }
