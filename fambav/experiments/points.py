"""What the rows of a grid came to, read back from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fambav.experiments.archive import JSON
from fambav.experiments.figures import Estimate


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row of a grid.

    Attributes:
        name: Its name; no other row has the same.
        labels: What stands in the columns of names.
        baseline: Whether it is the row without reduction, with which others are compared.
        phase: The phase that the figures are of.
        settings: What differs from the row without reduction.
        method: Who removes tokens; "none" for nobody.
        figures: What was measured: `acc1` and `acc5` in percent, after the last epoch; `seconds` of
            training, `seconds_per_epoch`, `images_per_second`; `memory_mib`, peak memory while
            training; `token_layers`, tokens summed over the layers as a share of those without
            reduction; `flops`, operations for one image as papers count them.
        paper: What the paper reports of the row, as far as the grid says: `acc1`, `acc5`,
            `seconds`, `memory`.
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
    """Tell whether a folder holds the results of a grid."""
    return (folder / JSON).is_file()


def points(folder: Path, *, phase: str | None = None) -> list[Point]:
    """Return the rows of a grid of which a cell is finished, in the grid's order.

    Args:
        folder: The grid's folder; it may be half finished.
        phase: One of PHASES, such as "training-free"; None for the one that trains.

    Raises:
        ValueError: If the folder holds no results, they are damaged, or no row has the phase.
    """
    path = folder / JSON
    if not path.is_file():
        raise ValueError(f"grid is {str(folder)!r}, expected a folder with {JSON} in it")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        wanted = told["phase"] if phase is None else phase
        every = [_point(row, wanted) for row in told["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged, expected the results of a grid") from None
    found = [point for point in every if point.figures]
    known = list(dict.fromkeys(name for row in told["rows"] for name in row["phases"]))
    if not found and known:
        raise ValueError(f"phase is {wanted!r}, expected one of {', '.join(known)}")
    return found


def _point(row: dict[str, Any], phase: str) -> Point:
    figures, paper = row["phases"].get(phase, {}), row["paper"]
    return Point(
        name=row["name"],
        labels=tuple(row["labels"]),
        baseline=row["baseline"],
        phase=phase,
        settings=row["settings"],
        method=row["method"],
        figures={name: Estimate(**known) for name, known in figures.items()},
        paper=paper and {name: value for name, value in paper.items() if value is not None},
    )
