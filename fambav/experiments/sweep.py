"""Carry out a grid: what is finished stays, what is missing runs, and the tables follow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from fambav.comparison.likeness import differing, machine, told
from fambav.engine import record
from fambav.engine.lock import locked
from fambav.experiments import archive, results, summary
from fambav.experiments.grid import Cell, Grid
from fambav.experiments.results import Record, Task
from fambav.experiments.workers import Workers

_NAMED = 6  # failed cells that an error names


def run(
    grid: Grid,
    folder: Path,
    *,
    jobs: int,
    keep: bool,
    say: Callable[[str], None],
    mixed: bool = False,
) -> dict[str, Record]:
    """Carry out what is missing of a grid.

    The tables in `folder` are written anew after each cell.

    Args:
        grid: What to carry out.
        folder: Gets the cells and the tables, results.csv, results.json and results.md.
        jobs: Processes that work at once, at least 1.
        keep: Whether the checkpoints of trained cells stay.
        say: Is told of each finished cell in one line.
        mixed: Whether cells may come from several machines; the table then has no time and memory.

    Returns:
        The records of all cells, by their names.

    Raises:
        ValueError: If another process works in the folder, or its cells come from another machine.
        OSError: If the folder cannot be written.
    """
    with locked(folder):
        record.prepare(folder)
        about = record.environment(jobs=jobs)
        found = {c.name: known for c in grid.cells if (known := results.finished(c, folder))}
        left = [cell for cell in grid.cells if cell.name not in found]
        if not mixed:
            _refuse_mixed(folder, found, about if left else None)
        say(f"{len(found)} of {len(grid.cells)} cells are finished")
        summary.write(grid, found, folder, mixed=mixed)
        pace = Pace(found.values(), left, jobs)
        with Workers(min(jobs, max(1, len(left)))) as workers:
            for wave in _waves(left):
                tasks = [Task(cell, folder, keep, about) for cell in wave]
                for task, known in workers.perform(tasks):
                    found[task.cell.name] = known
                    pace.count(task.cell, known)
                    summary.write(grid, found, folder, mixed=mixed)
                    line = _line(task.cell, known)
                    say(f"[{len(found)}/{len(grid.cells)}] {line}{pace.text()}")
        if not mixed:
            _refuse_mixed(folder, found, None)  # processes may have found GPUs of several kinds
    return found


def refuse_failures(grid: Grid, found: dict[str, Record], folder: Path) -> None:
    """Name the cells that failed.

    Args:
        grid: The grid.
        found: Records by the names of cells.
        folder: Where the tables are.

    Raises:
        ValueError: If there are any.
    """
    failed = [name for name, known in found.items() if known["error"] is not None]
    if failed:
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise ValueError(
            f"{len(failed)} of {len(grid.cells)} cells failed: {'; '.join(failed[:_NAMED])}{more}; "
            f"{folder / archive.CSV} has the reasons"
        )


class Pace:
    """How long the rest will take, from what cells of the same phase have taken.

    Args:
        done: Records of finished cells.
        left: Cells to come.
        jobs: Processes that share them.
    """

    def __init__(self, done: Iterable[Record], left: Iterable[Cell], jobs: int) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._left = [cell.phase for cell in left]
        self._jobs = jobs
        for known in done:
            self._add(known)

    def count(self, cell: Cell, known: Record) -> None:
        """Take note that a cell is done."""
        self._left.remove(cell.phase)
        self._add(known)

    def text(self) -> str:
        """Return what is left as the end of a line, nothing while a phase has not been seen."""
        if not self._left or not set(self._left) <= self._seconds.keys():
            return ""
        seconds = sum(fmean(self._seconds[phase]) for phase in self._left) / self._jobs
        return f"; {seconds / 60:.1f} min left"

    def _add(self, known: Record) -> None:
        if known["error"] is None and known["wall_seconds"] is not None:
            self._seconds[known["phase"]].append(known["wall_seconds"])


def _waves(left: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that start from nothing, then those that start from one of them."""
    waves: tuple[list[Cell], list[Cell]] = ([], [])
    for cell in left:
        waves[cell.start is not None].append(cell)
    return [wave for wave in waves if wave]


def _refuse_mixed(folder: Path, found: dict[str, Record], here: Record | None) -> None:
    """Refuse cells of several machines, those that are to run here among them.

    A cell's number of threads is one of its settings, so that what the grid's own process says of
    it does not count.
    """
    places = [*(known["about"] for known in found.values()), *([] if here is None else [here])]
    differences = differing(machine(about, without=["threads"]) for about in places)
    if differences:
        raise ValueError(
            f"cells in {folder} and those to run differ in {told(differences)}, expected one "
            "machine and one number of jobs; --mixed leaves time and memory out of the table"
        )


def _line(cell: Cell, known: Record) -> str:
    if known["error"] is not None:
        return f"{cell.name}: failed: {known['error']}"
    return f"{cell.name}: {known['figures']['acc1']:.2f} % in {known['wall_seconds']:.1f} s"
