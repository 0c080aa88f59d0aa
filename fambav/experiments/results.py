"""The figures of a grid: means over seeds, the files for programs, and their reader.

results.csv     one line per cell: row, its settings, seed, phase, the figures, machine, versions
results.json    the same with every setting of each cell, and the means over seeds of each row
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fambav.arguments import near_path
from fambav.config import Config, Run
from fambav.experiments.grid import PHASES, Cell, Grid
from fambav.experiments.provenance import machine
from fambav.experiments.rows import Row
from fambav.json_files import read_object
from fambav.registry import DATA_SETS, FOREIGN, METHODS
from fambav.tasks import Task, task_of

Record = dict[str, Any]

CSV, JSON, MARKDOWN = "results.csv", "results.json", "results.md"
FLOPS = "flops"

_OPEN = (float, type(None))
_DOCUMENT = {  # what is read of JSON
    "grid": str,
    "title": str,
    "phase": str,
    "rows": [
        {
            "name": str,
            "labels": [str],
            "baseline": bool,
            "method": str,
            "settings": dict,
            "paper": ({str: _OPEN}, type(None)),
            "phases": {str: {str: {"mean": float, "std": _OPEN, "count": int}}},
        }
    ],
    "cells": [{"figures": {str: (str, *_OPEN)}}],
}
_COSTS = ("seconds", "seconds_per_epoch", "images_per_second", "memory_mib")
_MACHINE = ("platform", "cpu", "cpu_count", "threads", "gpu", "jobs")


@dataclass(frozen=True)
class Estimate:
    """A figure over seeds.

    Attributes:
        mean: Of the seeds that are finished.
        std: Sample standard deviation; None with one seed.
        count: How many seeds are behind it.
    """

    mean: float
    std: float | None
    count: int

    def text(self, digits: int, unit: float = 1.0) -> str:
        """Return the mean and, if there is one, the deviation, divided by `unit`."""
        std = "" if self.std is None else f" ± {self.std / unit:.{digits}f}"
        return f"{self.mean / unit:.{digits}f}{std}"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and the sample standard deviation of at least one value."""
    return Estimate(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


class Results:
    """The records of the cells of a grid.

    Args:
        grid: The grid.
        records: Of finished and failed cells, by the names of cells.

    Attributes:
        grid, records: The same.
    """

    def __init__(self, grid: Grid, records: Mapping[str, Record]) -> None:
        self.grid, self.records = grid, records
        self._metrics = tuple(metric.name for metric in grid.task.metrics)

    def by_seed(self, row: Row, phases: Iterable[str], name: str) -> dict[int, float]:
        """Return a figure of a row by seed, from the first of some phases that has it.

        Args:
            row: The row.
            phases: Some of PHASES.
            name: Of a figure of a record, or FLOPS.
        """
        for phase in phases:
            known = (c for c in self.grid.of(row, phase) if self._finished(c))
            figures = {cell.seed: self._figure(cell, name) for cell in known}
            if values := {seed: float(v) for seed, v in figures.items() if v is not None}:
                return values
        return {}

    @property
    def failed(self) -> list[str]:
        """Names of the cells that failed, in the order in which they ran."""
        names = (cell.name for cell in self.grid.cells if cell.name in self.records)
        return [name for name in names if self.records[name]["error"] is not None]

    def values(self) -> list[list[Any]]:
        """Return a head and a line per cell, in the order of the rows; None where there is none."""
        keys = list(dict.fromkeys(key for row in self.grid.rows for key in row.settings))
        figures = [*self._metrics, "token_layers", "epochs", *_COSTS, "memory_kind"]
        where = [*_MACHINE, "versions", "commit", "started", "ended"]
        lines: list[list[Any]] = [["row", *keys, "seed", "phase", *figures, "error", *where]]
        for cell, known in self._ordered():
            about = known["about"]
            own = map(cell.row.settings.get, keys)
            line = [cell.row.name, *own, cell.seed, cell.phase]
            line += map(known["figures"].get, figures)
            line += [known["error"], *map(about.get, _MACHINE), described_versions(about)]
            lines.append([*line, about.get("commit"), *_times(known).values()])
        return lines

    def document(self) -> dict[str, Any]:
        """Return all that is known, as JSON holds it."""
        grid = self.grid
        return {
            "grid": grid.name,
            "title": grid.title or grid.name,
            "train": "scratch" if grid.scratch else "from-unreduced",
            "phase": grid.phase,
            "names": grid.names,
            "seeds": grid.seeds,
            "baseline": grid.baseline.name,
            "paper": grid.source,
            "rows": [self._row(row) for row in grid.rows],
            "cells": [_cell(cell, known) for cell, known in self._ordered()],
        }

    def _finished(self, cell: Cell) -> bool:
        return cell.name in self.records and self.records[cell.name]["error"] is None

    def _figure(self, cell: Cell, name: str) -> float | None:
        if name == FLOPS:
            return _operations(replace(cell.config, run=Run()))
        figure: float | None = self.records[cell.name]["figures"].get(name)
        return figure

    def _ordered(self) -> list[tuple[Cell, Record]]:
        rank = {row.slug: number for number, row in enumerate(self.grid.rows)}
        known = [cell for cell in self.grid.cells if cell.name in self.records]
        known.sort(key=lambda cell: rank[cell.row.slug])
        return [(cell, self.records[cell.name]) for cell in known]

    def _row(self, row: Row) -> dict[str, Any]:
        phases: dict[str, dict[str, Any]] = {}
        for phase in PHASES:
            names = (*self._metrics, "token_layers", *_COSTS, FLOPS)
            values = {name: self.by_seed(row, [phase], name) for name in names}
            means = {n: asdict(estimate(list(v.values()))) for n, v in values.items() if v}
            if means:
                phases[phase] = means
        return {
            "name": row.name,
            "labels": row.labels,
            "baseline": row.name == self.grid.baseline.name,
            "method": self._method(row),
            "settings": row.settings,
            "paper": row.paper,
            "phases": phases,
        }

    def _method(self, row: Row) -> str:
        """The method of reduction: one of METHODS, or none."""
        config = next(cell for phase in PHASES for cell in self.grid.of(row, phase)).config
        reduction, fusion = config.reduction.reduction, config.fusion
        if reduction in METHODS:
            return reduction
        fused = fusion.fusion_plan is not None or fusion.fusion_strategy != "none"
        return fusion.fusion_method if fused else "none"


@cache
def _operations(config: Config) -> int | None:
    """Operations of an image as papers count them; None for timm's models, whose parts are unknown.

    Also None where only the files of the data set hold the number of classes.
    """
    from fambav import flops  # loads torch, which tables of runs do without

    unknown = config.model.num_classes is None and config.data.data_set not in flops.CLASSES
    if unknown or config.model.model.startswith(FOREIGN):
        return None
    return flops.count_config(config).total.literature


def described_versions(about: Record) -> str:
    """Return the versions of what a cell ran with, in one line."""
    return ", ".join(f"{name} {version}" for name, version in _versions(about).items())


def _versions(about: Record) -> dict[str, str]:
    return {"fambav": about["fambav"], "python": about["python"], **about["packages"]}


def _times(known: Record) -> dict[str, str | None]:
    """When a cell began and ended; of a record without times, when the grid began."""
    began = known.get("started") or known["about"]["started"]
    return {"started": began, "ended": known.get("ended")}


def _cell(cell: Cell, known: Record) -> dict[str, Any]:
    about = known["about"]
    return {
        "row": cell.row.name,
        "seed": cell.seed,
        "phase": cell.phase,
        "folder": str(cell.folder),
        "figures": known["figures"],
        "error": known["error"],
        "wall_seconds": known.get("wall_seconds"),
        "commit": about.get("commit"),
        "versions": _versions(about),
        "machine": machine(about),
        **_times(known),
        **known.get("settings", cell.settings),
    }


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row of a grid, read back.

    Attributes:
        name: Its name; no other row has the same.
        labels: What stands in the columns of names.
        baseline: Whether it is the row without reduction, with which others are compared.
        phase: The phase that the figures are of.
        settings: What differs from the row without reduction.
        method: The method of reduction, or "none".
        figures: What was measured: metrics after the last epoch; `seconds` of training,
            `seconds_per_epoch`, `images_per_second`; `memory_mib`, peak memory while training;
            `token_layers`, tokens summed over the layers as a share of those without reduction;
            `flops`, operations for one image as papers count them.
        paper: What the paper reports of the row, as far as the grid lists it, by name.
    """

    name: str
    labels: tuple[str, ...]
    baseline: bool
    phase: str
    settings: dict[str, Any]
    method: str
    figures: dict[str, Estimate]
    paper: dict[str, float] | None


def is_grid(folder: Path) -> bool:
    """Return whether a folder holds the results of a grid."""
    return (folder / JSON).is_file()


def read_points(folder: Path, *, phase: str | None = None) -> list[Point]:
    """Return the rows of a grid of which a cell is finished, in the grid's order.

    Args:
        folder: The grid's folder; it may be half finished.
        phase: One of PHASES, such as "training-free"; None for the one that trains.

    Raises:
        ValueError: If the folder holds no results, they are damaged, or no row has the phase.
    """
    document = _document(folder)
    wanted = document["phase"] if phase is None else phase
    points = [point for row in document["rows"] if (point := _point(row, wanted)).figures]
    known = list(dict.fromkeys(name for row in document["rows"] for name in row["phases"]))
    if not points and known:
        raise ValueError(f"phase is {wanted!r}, expected one of {', '.join(known)}")
    return points


def read_title(folder: Path) -> tuple[str, str]:
    """Return the title of a grid, and what its memory counts.

    Raises:
        ValueError: If the folder holds no results, or they are damaged.
    """
    document = _document(folder)
    kinds = {cell["figures"].get("memory_kind") for cell in document["cells"]} - {None}
    return document["title"] or document["grid"], "; ".join(sorted(map(str, kinds)))


def read_task(folder: Path) -> Task:
    """Return the task that the cells of a grid learn.

    Raises:
        ValueError: If the folder holds no results, or they are damaged.
    """
    for cell in _document(folder)["cells"]:
        match cell:
            case {"config": {"data_set": str(name)}} if name in DATA_SETS:
                return task_of(name)
    return task_of(next(iter(DATA_SETS)))


def _document(folder: Path) -> dict[str, Any]:
    """The results of a grid, of which all that is read here is there."""
    path = folder / JSON
    if not path.is_file():
        hint = near_path(folder)
        raise ValueError(f"grid is {str(folder)!r}, expected a folder with {JSON} in it{hint}")
    return read_object(path, "the results of a grid", _DOCUMENT)


def _point(row: dict[str, Any], phase: str) -> Point:
    figures, paper = row["phases"].get(phase, {}), row["paper"]
    return Point(
        name=row["name"],
        labels=tuple(row["labels"]),
        baseline=row["baseline"],
        phase=phase,
        settings=row["settings"],
        method=row["method"],
        figures={
            name: Estimate(own["mean"], own["std"], own["count"]) for name, own in figures.items()
        },
        paper=paper and {name: value for name, value in paper.items() if value is not None},
    )
