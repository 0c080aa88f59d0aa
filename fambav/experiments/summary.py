"""The tables of a grid.

results.csv    one line per cell: row, its settings, seed, phase and the figures
results.md     one line per row: mean and sample standard deviation over the seeds
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fambav.comparison import drawn
from fambav.engine.checkpoint import write_text
from fambav.experiments.grid import DENSE, FREE, TUNED, Grid, Row
from fambav.experiments.results import Record

CSV, MARKDOWN = "results.csv", "results.md"
Records = Mapping[str, Record]

_FIGURES = (
    "acc1",
    "token_layers",
    "epochs",
    "seconds",
    "seconds_per_epoch",
    "images_per_second",
    "memory_mib",
    "memory_kind",
)
_HEAD = (
    "row",
    "token-layers",
    "training-free %",
    "fine-tuned %",
    "s per epoch",
    "images/s",
    "memory MiB",
)


def write(grid: Grid, found: Records, folder: Path) -> None:
    """Write both tables.

    Args:
        grid: The grid.
        found: Records of finished and failed cells, by the names of cells.
        folder: Gets the files.
    """
    write_text(folder / CSV, tidy(grid, found))
    write_text(folder / MARKDOWN, f"{table(grid, found, markdown=True)}\n")


def tidy(grid: Grid, found: Records) -> str:
    """Return one line of CSV per cell, in the order of the rows; a missing figure is empty."""
    keys = list(dict.fromkeys(key for row in grid.rows for key in row.settings))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", *keys, "seed", "phase", *_FIGURES, "error", "commit", "date"])
    rank = {row.slug: number for number, row in enumerate(grid.rows)}
    for cell in sorted(grid.cells, key=lambda cell: rank[cell.row.slug]):
        if (known := found.get(cell.name)) is None:
            continue
        given, figures, about = cell.row.settings, known["figures"], known["about"]
        lines.writerow(
            [cell.row.name, *(given.get(key) for key in keys), cell.seed, cell.phase]
            + [figures.get(name) for name in _FIGURES]
            + [known["error"], about["commit"], about["started"]]
        )
    return text.getvalue()


def table(grid: Grid, found: Records, *, markdown: bool) -> str:
    """Return one line per row, and below them how and where the figures were measured.

    Args:
        grid: The grid.
        found: Records by the names of cells.
        markdown: Whether to draw it in Markdown.
    """
    lines = drawn(
        [_HEAD, *(_row(grid, row, found) for row in grid.rows)], names=1, markdown=markdown
    )
    return "\n".join([*lines, "", *_notes(grid, found)])


def _row(grid: Grid, row: Row, found: Records) -> list[str]:
    """The cells of a row; speed and memory are those of fine-tuning, else of the dense training."""
    free, tuned = (_figures(grid, row, phase, found) for phase in (FREE, TUNED))
    if not row.settings:
        free = _figures(grid, row, DENSE, found)
        tuned = tuned or free
    return [
        row.name,
        _mean([*free, *tuned], "token_layers", 3),
        _spread(free, "acc1", 2, len(grid.seeds)),
        _spread(_figures(grid, row, TUNED, found), "acc1", 2, len(grid.seeds)),
        _spread(tuned, "seconds_per_epoch", 2, len(grid.seeds)),
        _mean(tuned, "images_per_second", 0),
        _mean(tuned, "memory_mib", 2),
    ]


def _figures(grid: Grid, row: Row, phase: str, found: Records) -> list[Record]:
    cells = [cell for cell in grid.cells if cell.row is row and cell.phase == phase]
    return [found[c.name]["figures"] for c in cells if c.name in found and _is_fine(found[c.name])]


def _is_fine(known: Record) -> bool:
    return known["error"] is None


def _values(figures: Sequence[Record], name: str) -> list[float]:
    return [value for known in figures if (value := known.get(name)) is not None]


def _mean(figures: Sequence[Record], name: str, digits: int) -> str:
    values = _values(figures, name)
    return f"{fmean(values):.{digits}f}" if values else "-"


def _spread(figures: Sequence[Record], name: str, digits: int, seeds: int) -> str:
    """The mean, the spread of two seeds or more, and how many there are if some are missing."""
    values = _values(figures, name)
    if not values:
        return "-"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    missing = f" ({len(values)} of {seeds})" if len(values) < seeds else ""
    return f"{fmean(values):.{digits}f}{spread}{missing}"


def _notes(grid: Grid, found: Records) -> list[str]:
    seeds = ", ".join(map(str, grid.seeds))
    lines = [
        f"{grid.path.name}: mean ± sample standard deviation over seeds {seeds}; top-1 of the "
        "held-out images after the last epoch; speed and memory while training"
    ]
    kinds = _distinct(known["figures"].get("memory_kind") for known in found.values())
    if kinds:
        lines.append(f"memory: {'; '.join(kinds)}")
    about = [known["about"] for known in found.values()]
    for label, texts in {
        "commit": [entry["commit"] for entry in about],
        "date": [str(entry["started"])[:10] for entry in about],
        "machine": [_machine(entry) for entry in about],
        "versions": [_versions(entry) for entry in about],
    }.items():
        if named := _distinct(texts):
            lines.append(f"{label}: {'; '.join(named)}")
    failed = [name for name, known in found.items() if not _is_fine(known)]
    if failed:
        lines.append(f"failed: {'; '.join(failed)}")
    return [line for pair in zip(lines, [""] * len(lines), strict=True) for line in pair][:-1]


def _machine(about: Record) -> str:
    gpu = "" if about["gpu"] is None else f", {about['gpu']}"
    jobs = about["jobs"]
    processes = "one process" if jobs == 1 else f"{jobs} processes at once"
    return f"{about['platform']}, {about['cpu_count']} cores{gpu}, {processes}"


def _versions(about: Record) -> str:
    packages = {"fambav": about["fambav"], "python": about["python"], **about["packages"]}
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _distinct(texts: Any) -> list[str]:
    """Each text once, in the order of their first appearance, without None."""
    return list(dict.fromkeys(text for text in texts if text is not None))
