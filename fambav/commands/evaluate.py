"""fambav evaluate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fambav import config, launcher
from fambav.commands.output import check_files, print_line, write
from fambav.commands.parser import Parser
from fambav.commands.trained import RUN
from fambav.config import ConfigError, read_flags

if TYPE_CHECKING:
    from fambav.training.evaluation import Evaluation
    from fambav.training.inference import LoadedRun

_PICTURES = (".png", ".svg")


def run(words: list[str]) -> None:
    """Score a trained model on its evaluation set: metrics, classes, confusions, predictions."""
    given, rest = _parser().parse_known_args(words)
    picture, predictions = given.confusion, given.predictions
    if picture is not None and picture.suffix not in _PICTURES:
        raise ConfigError(
            f"--confusion is {str(picture)!r}, expected a file ending in {' or '.join(_PICTURES)}"
        )
    check_files(picture, predictions)
    if picture is not None and predictions is not None and _same(picture, predictions):
        raise ConfigError(
            f"--predictions is {str(predictions)!r}, expected another than --confusion"
        )
    settings = read_flags(rest)
    foreign = config.parse(rest) if {"model", "config"} & settings.keys() else None
    from fambav import viz
    from fambav.training.evaluation import ALLOWED, evaluate_run
    from fambav.training.inference import load_run

    if picture is not None:
        viz.require_matplotlib()
    trained = load_run(given.run, None if foreign else settings, config=foreign, allowed=ALLOWED)
    by_class = given.per_class or picture is not None
    result = evaluate_run(trained, by_class=by_class, by_sample=predictions is not None)
    if launcher.place(os.environ).rank:  # the first process prints and writes
        return
    print_line(result.task.line(result.scores))
    print_line(result.task.summary(result.scores))
    if given.per_class:
        print(result.classes().render("text"))
    if picture is not None:
        viz.save(
            viz.confusion(result.confusion(), result.names, title=_title(trained, result)),
            picture,
        )
    if predictions is not None:
        write(predictions, result.predictions().render("csv") + "\n")
    for file in filter(None, (picture, predictions)):
        print_line(f"written: {file}")


def _parser() -> Parser:
    parser = Parser(
        "fambav evaluate",
        usage="fambav evaluate RUN|CHECKPOINT [--per-class] [--confusion FILE.png] "
        "[--predictions FILE.csv] [--name value ...]",
        description=run.__doc__,
        epilog="Also main.py's --data-path, --device, --batch-size and the like, and flags that "
        "reduce the tokens of the same weights otherwise; of a file that is not ours --model, "
        "--data-set and whatever else describes it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN|CHECKPOINT", help=RUN)
    add(
        "--per-class", "--per_class", action="store_true", help="print a table, weakest class first"
    )
    add("--confusion", type=Path, metavar="FILE", help="draw the confusion matrix, .png or .svg")
    add(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="CSV of every sample: index, path, target, prediction, its probability",
    )
    return parser


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _title(trained: LoadedRun, result: Evaluation) -> str:
    primary = result.task.primary
    value = f"{primary.title} {result.scores.metrics[primary.name]:.2f}{primary.suffix}"
    return f"{trained.config.model.model} on {result.data.name}: {value}"
