"""The figures of a grid for programs, with where they come from.

results.csv     one line per cell: row, its settings, seed, phase, the figures, machine, versions
results.json    the same with every setting of each cell, and the means over seeds of each row
"""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from fambav.comparison.likeness import machine
from fambav.experiments.figures import Records, of_row, plain
from fambav.experiments.grid import DENSE, PHASES, Cell, Grid
from fambav.experiments.results import Record
from fambav.experiments.rows import Row
from fambav.registry import METHODS

CSV, JSON = "results.csv", "results.json"

_FIGURES = (
    "acc1",
    "acc5",
    "token_layers",
    "epochs",
    "seconds",
    "seconds_per_epoch",
    "images_per_second",
    "memory_mib",
    "memory_kind",
)
_MACHINE = ("platform", "cpu", "cpu_count", "threads", "gpu", "jobs")


def tidy(grid: Grid, found: Records) -> str:
    """Return one line of CSV per cell, in the order of the rows; a missing figure is empty."""
    keys = list(dict.fromkeys(key for row in grid.rows for key in row.settings))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    where = [*_MACHINE, "versions", "commit", "started", "ended"]
    lines.writerow(["row", *keys, "seed", "phase", *_FIGURES, "error", *where])
    for cell in _ordered(grid):
        if (known := found.get(cell.name)) is None:
            continue
        given, figures, about = cell.row.settings, known["figures"], known["about"]
        lines.writerow(
            [cell.row.name, *(given.get(key) for key in keys), cell.seed, cell.phase]
            + [figures.get(name) for name in _FIGURES]
            + [known["error"], *(about.get(name) for name in _MACHINE), versions(about)]
            + [about.get("commit"), *_times(known)]
        )
    return text.getvalue()


def document(grid: Grid, found: Records) -> str:
    """Return all that is known of a grid as JSON."""
    told = {
        "grid": grid.name,
        "title": grid.title or grid.name,
        "train": "scratch" if grid.scratch else "from-dense",
        "phase": grid.phase,
        "names": grid.names,
        "seeds": grid.seeds,
        "baseline": grid.baseline.name,
        "paper": grid.source,
        "rows": [_row(grid, row, found) for row in grid.rows],
        "cells": [_cell(cell, found[cell.name]) for cell in _ordered(grid) if cell.name in found],
    }
    return json.dumps(told, indent=1)


def versions(about: Record) -> str:
    """Return the versions of what a cell ran with, in one line."""
    packages = {"fambav": about["fambav"], "python": about["python"], **about["packages"]}
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _ordered(grid: Grid) -> list[Cell]:
    rank = {row.slug: number for number, row in enumerate(grid.rows)}
    return sorted(grid.cells, key=lambda cell: rank[cell.row.slug])


def _times(known: Record) -> tuple[str | None, str | None]:
    """When a cell began and ended; of a record that does not say, when the grid began."""
    return known.get("started") or known["about"]["started"], known.get("ended")


def _row(grid: Grid, row: Row, found: Records) -> dict[str, Any]:
    phases = {phase: of_row(grid, row, phase, found) for phase in PHASES}
    return {
        "name": row.name,
        "labels": row.labels,
        "baseline": row.name == grid.baseline.name,
        "method": _method(grid, row),
        "settings": row.settings,
        "paper": None if row.paper is None else row.paper._asdict(),
        "phases": {phase: plain(known) for phase, known in phases.items() if known},
    }


def _method(grid: Grid, row: Row) -> str:
    """Who removes tokens: one of METHODS, or none."""
    phase = DENSE if row.name == DENSE and not grid.scratch else None
    cell = next(c for c in grid.cells if c.row.name == row.name and phase in (None, c.phase))
    reduction, fusion = cell.config.reduction.reduction, cell.config.fusion
    if reduction in METHODS:
        return reduction
    fused = fusion.fusion_plan is not None or fusion.fusion_strategy != "none"
    return fusion.fusion_method if fused else "none"


def _cell(cell: Cell, known: Record) -> dict[str, Any]:
    about = known["about"]
    started, ended = _times(known)
    return {
        "row": cell.row.name,
        "seed": cell.seed,
        "phase": cell.phase,
        "folder": str(cell.place),
        "figures": known["figures"],
        "error": known["error"],
        "wall_seconds": known.get("wall_seconds"),
        "commit": about.get("commit"),
        "versions": {"fambav": about["fambav"], "python": about["python"], **about["packages"]},
        "machine": machine(about),
        "started": started,
        "ended": ended,
        **known.get("settings", cell.settings),
    }
