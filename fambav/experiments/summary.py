"""The table of a grid: a line for each row, means over the seeds, differences to no reduction."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any, NamedTuple

from fambav.experiments.grid import FREE, SCRATCH, TUNED, UNREDUCED, Grid
from fambav.experiments.metrics import all_metrics, difference
from fambav.experiments.results import FLOPS, Record, Results, described_versions, estimate
from fambav.experiments.rows import COSTS, Row
from fambav.table import Table

_HOUR = 3600.0
_TRAINED = (SCRATCH, TUNED, UNREDUCED)


class _Column(NamedTuple):
    head: str
    name: str  # of the figure
    phases: tuple[str, ...]  # where it is looked for, the first that has it
    compared: bool = True  # whether it has the difference to the row without reduction
    digits: int = 2
    unit: float = 1.0  # what the figure is divided by
    spread: bool = True  # whether it has the deviation over seeds
    costs: bool = False  # whether it depends on the machine


def table(results: Results, *, mixed: bool = False) -> Table:
    """Return one line per row, and below them how and where the figures were measured.

    Args:
        results: The grid and its records.
        mixed: Whether cells may be of several machines; time and memory are then left out of what
            people read.
    """
    grid = results.grid
    columns = [column for column in _columns(results) if not (mixed and column.costs)]
    paper = _paper_columns(grid, mixed=mixed)
    return Table(
        head=[*grid.names, *(column.head for column in columns), *paper.values()],
        rows=[
            [
                *row.labels,
                *(_cell(results, row, column) for column in columns),
                *(_reported(grid, row, name) for name in paper),
            ]
            for row in grid.rows
        ],
        names=len(grid.names),
        notes=_notes(results, mixed=mixed),
        title=grid.title,
        values=results.values(),
        document=results.document(),
    )


def _columns(results: Results) -> list[_Column]:
    grid, metrics = results.grid, results.grid.task.metrics
    phases = (FREE, *_TRAINED)
    most = max(results.by_seed(grid.baseline, phases, FLOPS).values(), default=0.0)
    size, head = (1e9, "GFLOPs") if most >= 1e9 else (1e6, "MFLOPs")
    ours = [
        _Column("token-layers", "token_layers", phases, compared=False, digits=3, spread=False),
        _Column(head, FLOPS, phases, unit=size, spread=False),
    ]
    if grid.scratch:
        every = (results.by_seed(row, (SCRATCH,), "seconds").values() for row in grid.rows)
        long = max((value for values in every for value in values), default=0.0) >= _HOUR
        head, size, digits = ("train h", _HOUR, 2) if long else ("train s", 1.0, 1)
        ours += [
            *(_Column(m.head, m.name, (SCRATCH,), digits=m.digits) for m in metrics),
            _Column(head, "seconds", (SCRATCH,), digits=digits, unit=size, costs=True),
        ]
    else:
        speed = "images_per_second"
        ours += [
            *(
                _Column(f"{p} {metrics[0].unit}".rstrip(), metrics[0].name, (p,))
                for p in (FREE, TUNED)
            ),
            *(_Column(metric.head, metric.name, (TUNED, FREE)) for metric in metrics[1:]),
            _Column("s per epoch", "seconds_per_epoch", _TRAINED, costs=True),
            _Column(
                "images/s", speed, _TRAINED, compared=False, digits=0, spread=False, costs=True
            ),
        ]
    return [
        *ours,
        _Column("memory MiB", "memory_mib", _TRAINED, digits=1, spread=False, costs=True),
    ]


def _cell(results: Results, row: Row, column: _Column) -> str:
    """The mean, its deviation, how many seeds there are if some are missing, and the difference."""
    values = results.by_seed(row, column.phases, column.name)
    if not values:
        return "-"
    known, seeds = estimate(list(values.values())), len(results.grid.seeds)
    if column.spread:
        missing = f" [{known.count} of {seeds}]" * (known.count < seeds)
        text = known.text(column.digits, column.unit) + missing
    else:
        text = f"{known.mean / column.unit:.{column.digits}f}"
    baseline = results.grid.baseline
    if row.name == baseline.name or not column.compared:
        return text
    base = results.by_seed(baseline, column.phases, column.name)
    common = sorted(values.keys() & base.keys())
    if not common:
        return text
    ours, theirs = (fmean(known[seed] for seed in common) for known in (values, base))
    return f"{text} ({difference(column.name, ours, theirs, column.digits)})"


def _paper_columns(grid: Grid, *, mixed: bool) -> dict[str, str]:
    """Heads of the columns of what a paper reports, by figure, as far as rows have them."""
    what = "paper's Δ" if grid.differences else "paper:"
    labels = {name: metric.label for name, metric in all_metrics().items()} | {"seconds": "time"}
    return {
        name: f"{what} {labels.get(name, name)}"
        for name in (*all_metrics(), *COSTS)
        if any(row.paper and name in row.paper for row in grid.rows)
        and not (mixed and name in COSTS)
    }


def _reported(grid: Grid, row: Row, name: str) -> str:
    """What a paper reports of a row, beside it the difference to its row without reduction."""
    value, base = ((r.paper or {}).get(name) for r in (row, grid.baseline))
    if value is None:
        return "-"
    text = _clock(value) if name == "seconds" else f"{value:g}"
    if row.name == grid.baseline.name or base is None:
        return "" if grid.differences else text
    change = difference(name, value, base, 1)
    return change if grid.differences else f"{text} ({change})"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _notes(results: Results, *, mixed: bool) -> list[str]:
    grid, records = results.grid, results.records.values()
    seeds = ", ".join(map(str, grid.seeds))
    many = len(grid.seeds) > 1
    what = f"mean ± sample standard deviation over seeds {seeds}" if many else f"seed {seeds} alone"
    where = "" if mixed else "; speed and memory while training"
    lines = [
        f"{grid.path.name}: {what}, in brackets against {grid.baseline.name}; "
        f"accuracy of the held-out images after the last epoch{where}"
    ]
    if grid.source:
        lines.append(f"paper: {grid.source}")
    if grid.vary:
        lines.append(f"rows differ in {', '.join(grid.vary)} too")
    lines.append("FLOPs: one image, multiply-adds and scan terms as papers count them")
    about = [known["about"] for known in records]
    memory = [] if mixed else [known["figures"].get("memory_kind") for known in records]
    for label, texts in {
        "memory": memory,
        "commit": [entry["commit"] for entry in about],
        "date": [str(entry["started"])[:10] for entry in about],
        "machine": [_machine(entry) for entry in about],
        "versions": [described_versions(entry) for entry in about],
        "failed": results.failed,
    }.items():
        if named := _distinct(texts):
            lines.append(f"{label}: {'; '.join(named)}")
    return lines


def _machine(about: Record) -> str:
    gpu = "" if about["gpu"] is None else f", {about['gpu']}"
    cpu = f", {about['cpu']}" if about.get("cpu") else ""
    jobs = about["jobs"]
    processes = "one process" if jobs == 1 else f"{jobs} processes at once"
    return f"{about['platform']}{cpu}, {about['cpu_count']} cores{gpu}, {processes}"


def _distinct(texts: Iterable[Any]) -> list[str]:
    """Each text once, in the order of their first appearance, without None."""
    return list(dict.fromkeys(text for text in texts if text is not None))
