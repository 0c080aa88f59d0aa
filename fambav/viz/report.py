"""One HTML page of finished runs and grids: tables, figures, plans, settings and machines.

Source of the numbers: log.txt, config.yaml, plan.json and env.json of each run, results.json of
each grid; accuracy by class is measured anew, with the run's weights on its held-out images.
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fambav import config, experiments
from fambav.arguments import file_path, file_paths
from fambav.config import OPTIONS
from fambav.data import DataError
from fambav.engine.checkpoint import write_text
from fambav.engine.run_dir import environment
from fambav.experiments import Point, Result
from fambav.table import Table
from fambav.tasks import Metric, Task
from fambav.training.evaluation import ALLOWED, NoClassesError, evaluate_run
from fambav.training.inference import load_run
from fambav.viz.front import pareto
from fambav.viz.render import Source, names_of, render
from fambav.viz.style import save

Embedded = tuple[str, str]  # what a picture shows, and the picture itself as a data address

_TEMPLATE = Path(__file__).with_name("page.html")
_CURVES = "curves"
_COLUMNS = {  # of a grid besides metrics: head and digits
    "token_layers": ("token-layers", 3),
    "seconds": ("train s", 1),
    "memory_mib": ("memory MiB", 2),
}


def write_report(
    folders: Sequence[Path],
    target: Path,
    *,
    title: str | None = None,
    mixed: bool = False,
    source: Source | None = None,
    by_class: bool = True,
) -> None:
    """Write a page of runs and grids, one file that needs no other and no network.

    Args:
        folders: Of finished runs and of grids.
        target: The file.
        title: Of the page; names of the folders by default.
        mixed: Whether the runs are of several machines or recipes: then their table has no time,
            memory and differences.
        source: Images to draw; the first held-out one of each run's data by default.
        by_class: Evaluate each run's weights on its held-out images, if they are at hand.

    Raises:
        ValueError: If a folder is neither a run nor a grid, something in it is damaged, runs are
            mixed without `mixed`, or matplotlib or Jinja2 is missing.
        OSError: If the file cannot be written.
    """
    folders, target = file_paths("folders", folders), file_path("target", target)
    grids = [folder for folder in folders if experiments.is_grid(folder)]
    runs = [folder for folder in folders if folder not in grids]
    results = [experiments.read_run(folder) for folder in runs]
    points = list(map(_grid, grids))
    tables = [experiments.compare(results, mixed=mixed)] if results else []
    tables += [_grid_table(*grid) for grid in points]
    names = names_of(runs) if runs else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        together = [_front(folder, *grid) for grid in points]
        drawn = dict(render(runs, folder, source=source, timed=not mixed)) if runs else {}
        embedded = {name: _embedded(entry.path, entry.title) for name, entry in drawn.items()}
    together += [embedded.pop(_CURVES)] if _CURVES in embedded and len(runs) > 1 else []
    sentences = [*_of_runs(results, mixed=mixed), *(_of_grid(*grid) for grid in points)]
    page = _template().render(
        title=title or f"fambav: {', '.join(folder.resolve().name for folder in folders)}",
        result=" ".join(sentences),
        made=_made(),
        tables=tables,
        pictures=together,
        runs=[
            {
                **_section(name, folder, result, by_class=by_class),
                "pictures": [
                    entry
                    for label, entry in embedded.items()
                    if len(runs) == 1 or label.startswith(f"{name}/")
                ],
            }
            for name, folder, result in zip(names, runs, results, strict=True)
        ],
    )
    write_text(target, page + "\n")


def _made() -> str:
    """When the page was made, and by which version."""
    about, when = environment(), time.strftime("%Y-%m-%d %H:%M")
    commit = "" if about["commit"] is None else f", commit {about['commit']}"
    return f"Made on {when} by fambav {about['fambav']}{commit}."


def _grid(folder: Path) -> tuple[str, Sequence[Point], Task]:
    """Name, rows and task of a grid."""
    return folder.resolve().name, experiments.read_points(folder), experiments.read_task(folder)


def _of_runs(results: Sequence[Result], *, mixed: bool) -> Iterator[str]:
    """Summarise runs: the only one, or the best of the others against the first."""
    if not results:
        return
    (first, *others), metric = results, results[0].primary
    best = _best(others, metric, _value) if others else first
    text = f"{best.name} reaches a held-out {metric.title} of {_shown(best)}"
    if others:
        text += f", {_difference(metric, _value(best) - _value(first))} {first.name}"
        if not mixed and best.epochs == first.epochs:
            text += f", in {100 * best.seconds / first.seconds:.0f}% of its training time"
    else:
        text += f" after {best.epochs} epochs and {best.seconds:.1f} s of training"
    kept = "" if best.share is None else f"; tokens kept: {100 * best.share:.0f}% of token-layers"
    several = f"Best of the {len(others)} runs beside the first: " if len(others) > 1 else ""
    yield f"{several}{text}{kept}."


def _of_grid(grid: str, points: Sequence[Point], task: Task) -> str:
    """Summarise a grid: the best row, and its difference to the row without reduction."""
    metric = task.primary
    known = [point for point in points if metric.name in point.figures]
    reduced = [point for point in known if not point.baseline]
    if not known:
        return f"{grid} has no row with a {metric.title} yet."
    best = _best(reduced or known, metric, lambda point: point.figures[metric.name].mean)
    value = best.figures[metric.name]
    among = " of the rows with reduction" if reduced else ""
    text = f"{grid}: {best.name} reaches the best {metric.title}{among}"
    text += f", {value.text(metric.digits)}{metric.suffix}"
    for base in (point for point in known if point.baseline and point is not best):
        text += f", {_difference(metric, value.mean - base.figures[metric.name].mean)} {base.name}"
        if "seconds" in best.figures and "seconds" in base.figures:
            share = best.figures["seconds"].mean / base.figures["seconds"].mean
            text += f", in {100 * share:.0f}% of its training time"
    return f"{text}."


def _best(items: Sequence[Any], metric: Metric, value: Any) -> Any:
    return (max if metric.higher_is_better else min)(items, key=value)


def _value(result: Result) -> float:
    return cast(float, result.metrics[result.primary.name])  # every log has it


def _shown(result: Result) -> str:
    return f"{_value(result):.{result.primary.digits}f}{result.primary.suffix}"


def _difference(metric: Metric, change: float) -> str:
    """Describe a difference: `0.52 points less than`."""
    unit = " points" if metric.unit == "%" else metric.suffix
    if round(change, metric.digits) == 0:
        return "as"
    return f"{abs(change):.{metric.digits}f}{unit} {'more' if change > 0 else 'less'} than"


def _section(name: str, folder: Path, result: Result, *, by_class: bool) -> dict[str, Any]:
    """Describe a run for the template."""
    settings = folder / "config.yaml"
    classes = _classes(folder) if by_class else None
    tables = [] if classes is None else [("Accuracy by class", classes)]
    tables += [("Plan", plan) for plan in _plan(folder)]
    changed = _changed(config.load(settings).flat())
    share = "" if result.share is None else f", {100 * result.share:.1f}% of token-layers kept"
    return {
        "name": name,
        "summary": f"{result.model}, reduction: {result.reduction}{share}; {result.primary.label} "
        f"{_shown(result)} after {result.seconds:.1f} s of training, "
        f"{result.memory_mib:.1f} MiB {result.memory_kind}.",
        "tables": [*tables, ("Settings that are not the defaults", changed)],
        "settings": settings.read_text(encoding="utf-8"),
        "environment": Table(
            head=("what", "value"),
            rows=list(map(list, _pairs(experiments.read_environment(folder)))),
            names=2,
        ),
    }


def _classes(folder: Path) -> Table | None:
    """Evaluate a run in this process, on a GPU if there is one; None if its task has no classes."""
    run = load_run(folder, {"device": None, "num_workers": 0}, allowed=ALLOWED)
    try:
        found = evaluate_run(run, by_class=True)
    except NoClassesError:
        return None
    except DataError as error:
        return Table(head=(), rows=(), names=0, notes=[f"not measured: {error}"])
    primary, scores = found.task.primary, found.scores
    value = f"{primary.title} {scores.metrics[primary.name]:.2f}{primary.suffix}"
    note = f"{run.source.name} on {found.data.name}: {value} on {scores.samples} held-out samples"
    return replace(found.classes(), notes=[note])


def _plan(folder: Path) -> Iterator[Table]:
    """Yield the tokens of each layer, of a model that has a plan."""
    plan = experiments.read_plan(folder)
    if not plan:
        return
    after, pairs = plan["after"], zip(plan["counts"], plan["lengths"], strict=True)
    yield Table(
        head=("layer", "tokens in", "removed", "tokens its mixer sees"),
        rows=[
            [str(layer), str(seen if after else seen + count), str(count or "-"), str(seen)]
            for layer, (count, seen) in enumerate(pairs, start=1)
        ],
        names=1,
        notes=[f"tokens are removed {'after' if after else 'before'} the mixer of their layer"],
    )


def _changed(flat: Mapping[str, Any]) -> Table:
    rows = [
        [name, _plain(value), _plain(OPTIONS[name].default)]
        for name, value in flat.items()
        if value != OPTIONS[name].default
    ]
    return Table(head=("setting", "value", "default"), rows=rows, names=3)


def _pairs(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def _grid_table(name: str, points: Sequence[Point], task: Task) -> Table:
    heads = {metric.name: (metric.head, metric.digits) for metric in task.metrics} | _COLUMNS
    columns = {k: v for k, v in heads.items() if any(k in p.figures for p in points)}
    return Table(
        title=name,
        head=("row", *(head for head, _ in columns.values())),
        rows=[
            [
                point.name,
                *(
                    point.figures[key].text(digits) if key in point.figures else "-"
                    for key, (_, digits) in columns.items()
                ),
            ]
            for point in points
        ],
        names=1,
        notes=["mean ± sample standard deviation over seeds"],
    )


def _front(folder: Path, name: str, points: Sequence[Point], task: Task) -> Embedded:
    title = f"{name}: {task.primary.title} against cost"
    path = folder / f"pareto_{name}.png"
    save(pareto(points, title=title, metric=task.primary), path)
    return _embedded(path, title)


def _embedded(path: Path, text: str) -> Embedded:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return text, f"data:image/{path.suffix.removeprefix('.')};base64,{data}"


def _template() -> Any:
    """Return the page's template; every text put into it is escaped.

    Raises:
        ValueError: If Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ValueError(
            'jinja2 is not installed, expected it for reports; pip install "fambav[viz]"'
        ) from None
    return jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
