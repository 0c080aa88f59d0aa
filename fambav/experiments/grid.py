"""A grid of settings and seeds: its rows, and the cells that have to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fambav.config import Config
from fambav.experiments.provenance import LOCATIONS
from fambav.experiments.rows import Row
from fambav.tasks import Task, task_of

UNREDUCED, FREE, TUNED, SCRATCH = PHASES = ("unreduced", "training-free", "fine-tuned", "scratch")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid.

    Attributes:
        row: Its row.
        seed: Of every random draw.
        phase: One of PHASES.
        config: Its settings, without the locations of files.
        start: The cell whose weights it starts from; None for one that starts from none.
    """

    row: Row
    seed: int
    phase: str
    config: Config
    start: Cell | None = None

    @property
    def name(self) -> str:
        """Row, seed and phase in words; no other cell of the grid has the same."""
        return f"{self.row.name}, seed {self.seed}, {self.phase}"

    @property
    def folder(self) -> Path:
        """Its folder, relative to the grid's."""
        return Path("cells", self.row.slug, f"seed{self.seed}", self.phase)

    @property
    def settings(self) -> dict[str, Any]:
        """All that its result depends on besides the code: plain data, as JSON reads it back."""
        start = None if self.start is None else _settings(self.start.config)
        return {"config": _settings(self.config), "start": start}

    def agrees(self, recorded: Any) -> bool:
        """Return whether recorded settings are those of this cell.

        A setting that the file does not know counts as the default, so that a result outlives the
        addition of settings.
        """
        now = self.settings
        if not isinstance(recorded, dict) or recorded.keys() != now.keys():
            return False
        return all(
            known == wanted
            or (isinstance(known, dict) and wanted is not None and _defaults() | known == wanted)
            for known, wanted in zip(map(recorded.get, now), now.values(), strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All that a file describes.

    Attributes:
        path: The file.
        title: What the table is called; may be empty.
        scratch: Whether every row is trained from scratch.
        names: Heads of the columns that name rows.
        rows: The rows in the order of the table.
        baseline: The row without reduction, with which the others are compared.
        vary: Settings besides those of reduction in which rows may differ.
        source: Where the papers' figures come from; empty without.
        differences: Whether tables have the paper's differences instead of its figures.
        seeds: The seeds.
        cells: The cells in the order in which they run: all unreduced models, then seed by seed.
    """

    path: Path
    title: str
    scratch: bool
    names: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: Row
    vary: tuple[str, ...]
    source: str
    differences: bool
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.path.stem

    @property
    def task(self) -> Task:
        """The task of its data set."""
        return task_of(self.cells[0].config.data.data_set)

    @property
    def phase(self) -> str:
        """The phase whose figures a row is known by: the one that trains, if there is one."""
        phases = {cell.phase for cell in self.cells}
        return next(phase for phase in (SCRATCH, TUNED, FREE) if phase in phases)

    def of(self, row: Row, phase: str) -> list[Cell]:
        """Return the cells of a row, one for each seed.

        Args:
            row: The row; training-free figures of the unreduced model are those of its training.
            phase: One of PHASES.
        """
        if phase == FREE and row.name == UNREDUCED and not self.scratch:
            phase = UNREDUCED
        return [cell for cell in self.cells if cell.row.name == row.name and cell.phase == phase]


def _settings(run: Config) -> dict[str, Any]:
    """All settings but the locations of files, a tuple as the list that JSON makes of it."""
    left_out = LOCATIONS | {"finetune"}
    flat = {name: value for name, value in run.flat().items() if name not in left_out}
    return {n: list(value) if isinstance(value, tuple) else value for n, value in flat.items()}


def _defaults() -> dict[str, Any]:
    return _settings(Config())
