"""Means over seeds, and the operations of an image, for the rows of a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import fmean, stdev
from typing import Any

from fambav import costs
from fambav.config import Config, Run
from fambav.costs.network import CLASSES
from fambav.experiments.grid import Cell, Grid
from fambav.experiments.results import Record
from fambav.experiments.rows import Row

Records = Mapping[str, Record]

FLOPS = "flops"
MEASURED = (
    "acc1",
    "acc5",
    "token_layers",
    "seconds",
    "seconds_per_epoch",
    "images_per_second",
    "memory_mib",
)


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


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and the sample standard deviation of at least one value."""
    return Estimate(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def by_seed(cells: Sequence[Cell], found: Records, name: str) -> dict[int, float]:
    """Return a figure of finished cells, by seed.

    Args:
        cells: Cells of one row and phase.
        found: Records by the names of cells.
        name: One of MEASURED, or FLOPS.
    """
    if name == FLOPS:
        counted = {cell.seed: operations(cell.config) for cell in cells if finished(cell, found)}
        return {seed: value for seed, value in counted.items() if value is not None}
    return {
        cell.seed: float(value)
        for cell in cells
        if finished(cell, found) and (value := found[cell.name]["figures"].get(name)) is not None
    }


def of_row(grid: Grid, row: Row, phase: str, found: Records) -> dict[str, Estimate]:
    """Return every figure that was measured of a row in a phase, by name."""
    values = {name: by_seed(grid.of(row, phase), found, name) for name in (*MEASURED, FLOPS)}
    return {name: estimate(list(known.values())) for name, known in values.items() if known}


def finished(cell: Cell, found: Records) -> bool:
    """Tell whether a cell has a result."""
    return cell.name in found and found[cell.name]["error"] is None


def operations(config: Config) -> int | None:
    """Return the operations of an image as papers count them; None where only files tell classes.

    Also None for a model that is not one of ours, whose parts are not known.
    """
    return _operations(replace(config, run=Run()))


@cache
def _operations(config: Config) -> int | None:
    unknown = config.model.num_classes is None and config.data.data_set not in CLASSES
    if unknown or config.model.model.startswith("timm/"):
        return None
    return costs.configured(config).total.literature


def plain(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return figures as JSON holds them."""
    return {name: asdict(known) for name, known in figures.items()}
