"""fambav evaluate."""

from __future__ import annotations

import argparse
import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fambav import config, launcher
from fambav.commands.output import check_files, print_line, write
from fambav.commands.parser import Parser
from fambav.commands.trained import METHOD_SETTINGS, RUN
from fambav.config import Config, ConfigError, read_flags
from fambav.table import FORMATS, Table

if TYPE_CHECKING:
    from fambav.training.evaluation import Evaluation
    from fambav.training.inference import LoadedRun

Settings = dict[str, Any]
Case = tuple[Settings, Config | None]

_PICTURES = (".png", ".svg")
_OF_REDUCTION = {"reduction_schedule", *METHOD_SETTINGS}  # which "none" has no use for


def run(words: list[str]) -> None:
    """Score a trained model on its evaluation set: metrics, classes, confusions, predictions."""
    given, rest = _parser().parse_known_args(words)
    _check_files(given)
    cases = [_case(rest, name) for name in given.reduction or [None]]
    if len(given.run) * len(cases) == 1 and given.format is None:
        _print_one(given, *cases[0])
        return
    if given.per_class or given.confusion is not None or given.predictions is not None:
        raise ConfigError("--per-class, --confusion and --predictions need one run, and no table")
    _print_table(given, cases)


def _case(flags: list[str], reduction: str | None) -> Case:
    """Read the settings of one evaluation, and those of a file that is not ours."""
    settings = read_flags(flags if reduction is None else [*flags, "--reduction", reduction])
    if settings.get("reduction") == "none":
        settings = {name: v for name, v in settings.items() if name not in _OF_REDUCTION}
    if not {"model", "config"} & settings.keys():
        return settings, None
    path, own = settings.get("config"), {n: v for n, v in settings.items() if n != "config"}
    return settings, Config.from_flat(own) if path is None else config.load(path).replace(**own)


def _check_files(given: argparse.Namespace) -> None:
    """Refuse files that could not be written, before any work is done."""
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


def _print_one(given: argparse.Namespace, settings: Settings, foreign: Config | None) -> None:
    """Score one run, and write what is wanted of it."""
    picture, predictions = given.confusion, given.predictions
    from fambav import viz
    from fambav.training.evaluation import ALLOWED, evaluate_run
    from fambav.training.inference import load_run

    if picture is not None:
        viz.require_matplotlib()
    trained = load_run(given.run[0], None if foreign else settings, config=foreign, allowed=ALLOWED)
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


def _print_table(given: argparse.Namespace, cases: list[Case]) -> None:
    """Score every run with every reduction, and print a table of them."""
    from fambav.training.evaluation import ALLOWED, evaluate_run
    from fambav.training.inference import load_run
    from fambav.training.network import layout

    rows: list[dict[str, Any]] = []
    for run, (settings, foreign) in product(given.run, cases):
        words = None if foreign else settings
        trained = load_run(run, words, config=foreign, allowed=ALLOWED)
        schedule, scores = layout(trained.config).schedule, evaluate_run(trained).scores
        row = {
            "run": str(run),
            "reduction": settings.get("reduction", "as given"),
            "token_layers_left_percent": schedule and round(100 * schedule.share, 2),
        }
        rows.append({**row, **scores.metrics, "samples": scores.samples})
    if not launcher.place(os.environ).rank:  # the first process prints
        print(_table(rows).render(given.format or FORMATS[0]))


def _table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of figures; what a row does not have is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    return Table(
        head=[name.replace("_percent", " %").replace("_", " ") for name in names],
        rows=[[cell(row.get(name)) for name in names] for row in rows],
        names=2,
        values=[names, *([row.get(name) for name in names] for row in rows)],
        document={"rows": rows},
    )


def _parser() -> Parser:
    parser = Parser(
        "fambav evaluate",
        usage="fambav evaluate RUN|CHECKPOINT ... [--reduction NAME ...] [--format NAME] "
        "[--per-class] [--confusion FILE.png] [--predictions FILE.csv] [--name value ...]",
        description=run.__doc__,
        epilog="Also main.py's --data-path, --device, --batch-size and the like, and flags that "
        "reduce the tokens of the same weights otherwise; of a file that is not ours --model, "
        "--data-set and whatever else describes it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, nargs="+", metavar="RUN|CHECKPOINT", help=RUN)
    add(
        "--reduction",
        nargs="+",
        default=(),
        metavar="NAME",
        help="methods instead of the run's own, or none; several, or several runs, make a table",
    )
    add("--format", choices=FORMATS, help="print a table in this form, also of one run")
    add("--per-class", action="store_true", help="print a table, weakest class first")
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
