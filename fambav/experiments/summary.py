"""The table of a grid: a line for each row, means over the seeds, differences to no reduction."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from fambav.comparison.tables import Table
from fambav.engine.checkpoint import write_text
from fambav.experiments import archive
from fambav.experiments.figures import FLOPS, Records, by_seed, estimate, finished
from fambav.experiments.grid import DENSE, FREE, SCRATCH, TUNED, Grid
from fambav.experiments.results import Record
from fambav.experiments.rows import Paper, Row

MARKDOWN = "results.md"

_HOUR = 3600.0


class Column(NamedTuple):
    """A column of figures.

    Attributes:
        head: What stands above it.
        name: The figure.
        phases: Where it is looked for, the first that has it.
        change: "points" or "percent" for a difference to the row without reduction.
        digits: Behind the point.
        unit: What the figure is divided by.
        spread: Whether the deviation over seeds is shown.
        costs: Whether it depends on the machine.
    """

    head: str
    name: str
    phases: tuple[str, ...]
    change: str = ""
    digits: int = 2
    unit: float = 1.0
    spread: bool = True
    costs: bool = False


def write(grid: Grid, found: Records, folder: Path, *, mixed: bool) -> None:
    """Write the table and what programs read.

    Args:
        grid: The grid.
        found: Records of finished and failed cells, by the names of cells.
        folder: Gets the files.
        mixed: Whether cells may come from several machines.
    """
    write_text(folder / archive.CSV, archive.tidy(grid, found))
    write_text(folder / archive.JSON, f"{archive.document(grid, found)}\n")
    drawn = table(grid, found, mixed=mixed).drawn("markdown")
    write_text(folder / MARKDOWN, f"{drawn}\n")


def rendered(grid: Grid, found: Records, form: str, *, mixed: bool = False) -> str:
    """Return a grid in one of comparison.FORMATS.

    Args:
        grid: The grid.
        found: Records by the names of cells.
        form: "csv" has a line for each cell, "json" everything, the others a line for each row.
        mixed: Whether cells come from several machines; time and memory are then left out of what
            people read.
    """
    if form == "csv":
        return archive.tidy(grid, found).removesuffix("\n")
    if form == "json":
        return archive.document(grid, found)
    return table(grid, found, mixed=mixed).drawn(form)


def table(grid: Grid, found: Records, *, mixed: bool = False) -> Table:
    """Return one line per row, and below them how and where the figures were measured.

    Args:
        grid: The grid.
        found: Records by the names of cells.
        mixed: Whether time and memory are left out.
    """
    columns = [c for c in _columns(grid, found) if not (mixed and c.costs)]
    paper = _paper_columns(grid, mixed=mixed)
    rows = [
        [
            *row.labels,
            *(_cell(grid, row, column, found) for column in columns),
            *(_reported(grid, row, name) for name in paper),
        ]
        for row in grid.rows
    ]
    head = [*grid.names, *(column.head for column in columns), *paper.values()]
    notes = _notes(grid, found, mixed=mixed)
    return Table(head=head, rows=rows, names=len(grid.names), notes=notes, title=grid.title)


def _columns(grid: Grid, found: Records) -> list[Column]:
    trained = (SCRATCH, TUNED, DENSE)
    ours = [
        Column("token-layers", "token_layers", (FREE, *trained), digits=3, spread=False),
        _operations(grid, found),
    ]
    if grid.scratch:
        ours += [
            Column("top-1 %", "acc1", (SCRATCH,), "points"),
            Column("top-5 %", "acc5", (SCRATCH,), "points"),
            _time(grid, found),
        ]
    else:
        ours += [
            Column("training-free %", "acc1", (FREE,), "points"),
            Column("fine-tuned %", "acc1", (TUNED,), "points"),
            Column("top-5 %", "acc5", (TUNED, FREE), "points"),
            Column("s per epoch", "seconds_per_epoch", trained, "percent", costs=True),
            Column("images/s", "images_per_second", trained, digits=0, spread=False, costs=True),
        ]
    memory = Column("memory MiB", "memory_mib", trained, "percent", 1, spread=False, costs=True)
    return [*ours, memory]


def _operations(grid: Grid, found: Records) -> Column:
    phases = (FREE, SCRATCH, TUNED, DENSE)
    most = max(_values(grid, grid.baseline, phases, FLOPS, found).values(), default=0.0)
    unit, head = (1e9, "GFLOPs") if most >= 1e9 else (1e6, "MFLOPs")
    return Column(head, FLOPS, phases, "percent", unit=unit, spread=False)


def _time(grid: Grid, found: Records) -> Column:
    seconds = [
        value
        for row in grid.rows
        for value in _values(grid, row, (SCRATCH,), "seconds", found).values()
    ]
    long = max(seconds, default=0.0) >= _HOUR
    head, unit, digits = ("train h", _HOUR, 2) if long else ("train s", 1.0, 1)
    return Column(head, "seconds", (SCRATCH,), "percent", digits, unit, costs=True)


def _values(
    grid: Grid, row: Row, phases: tuple[str, ...], name: str, found: Records
) -> dict[int, float]:
    """A figure by seed, from the first phase that has it."""
    for phase in phases:
        if values := by_seed(grid.of(row, phase), found, name):
            return values
    return {}


def _cell(grid: Grid, row: Row, column: Column, found: Records) -> str:
    """The mean, its deviation, how many seeds there are if some are missing, and the difference."""
    values = _values(grid, row, column.phases, column.name, found)
    if not values:
        return "-"
    known = estimate(list(values.values()))
    text = f"{known.mean / column.unit:.{column.digits}f}"
    if column.spread and known.std is not None:
        text += f" ± {known.std / column.unit:.{column.digits}f}"
    if column.spread and known.count < len(grid.seeds):
        text += f" [{known.count} of {len(grid.seeds)}]"
    if row.name == grid.baseline.name:
        return text
    base = _values(grid, grid.baseline, column.phases, column.name, found)
    return text + _difference(values, base, column)


def _difference(values: dict[int, float], base: dict[int, float], column: Column) -> str:
    """The difference to the row without reduction over the seeds that both have."""
    common = sorted(values.keys() & base.keys())
    if not common or not column.change:
        return ""
    ours, theirs = (fmean(known[seed] for seed in common) for known in (values, base))
    return f" ({_change(ours, theirs, column.change, column.digits)})"


def _change(value: float, base: float, change: str, digits: int) -> str:
    if change == "points":
        return f"{value - base:+.{digits}f}"
    return f"{100 * (value / base - 1):+.0f}%"


def _paper_columns(grid: Grid, *, mixed: bool) -> dict[str, str]:
    """Heads of the columns of what a paper reports, by figure, as far as rows have them."""
    what = "paper's Δ" if grid.differences else "paper:"
    heads = {"acc1": "top-1", "acc5": "top-5", "seconds": "time", "memory": "memory"}
    known = {
        name
        for row in grid.rows
        for name, value in (row.paper or Paper())._asdict().items()
        if value is not None and not (mixed and name in ("seconds", "memory"))
    }
    return {name: f"{what} {head}" for name, head in heads.items() if name in known}


def _reported(grid: Grid, row: Row, name: str) -> str:
    """What a paper reports of a row, beside it the difference to its row without reduction."""
    value = getattr(row.paper, name, None)
    base = getattr(grid.baseline.paper, name, None)
    if value is None:
        return "-"
    text = _clock(value) if name == "seconds" else f"{value:g}"
    if row.name == grid.baseline.name or base is None:
        return "" if grid.differences else text
    accuracy = name in ("acc1", "acc5")
    change = _change(value, base, "points" if accuracy else "percent", 1)
    return change if grid.differences else f"{text} ({change})"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _notes(grid: Grid, found: Records, *, mixed: bool) -> list[str]:
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
    kinds = _distinct(known["figures"].get("memory_kind") for known in found.values())
    if kinds and not mixed:
        lines.append(f"memory: {'; '.join(kinds)}")
    about = [known["about"] for known in found.values()]
    for label, texts in {
        "commit": [entry["commit"] for entry in about],
        "date": [str(entry["started"])[:10] for entry in about],
        "machine": [_machine(entry) for entry in about],
        "versions": [archive.versions(entry) for entry in about],
    }.items():
        if named := _distinct(texts):
            lines.append(f"{label}: {'; '.join(named)}")
    unfinished = [c.name for c in grid.cells if c.name in found and not finished(c, found)]
    if unfinished:
        lines.append(f"failed: {'; '.join(unfinished)}")
    return lines


def _machine(about: Record) -> str:
    gpu = "" if about["gpu"] is None else f", {about['gpu']}"
    cpu = f", {about['cpu']}" if about.get("cpu") else ""
    jobs = about["jobs"]
    processes = "one process" if jobs == 1 else f"{jobs} processes at once"
    return f"{about['platform']}{cpu}, {about['cpu_count']} cores{gpu}, {processes}"


def _distinct(texts: Any) -> list[str]:
    """Each text once, in the order of their first appearance, without None."""
    return list(dict.fromkeys(text for text in texts if text is not None))
