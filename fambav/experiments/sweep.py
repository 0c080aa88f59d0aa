"""Carry out a grid: what is finished stays, what is missing runs, and the tables follow."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

from fambav.engine import run_dir
from fambav.engine.checkpoint import write_text
from fambav.engine.lock import locked
from fambav.experiments.grid import FREE, Cell, Grid
from fambav.experiments.process import Process, finished, slots
from fambav.experiments.provenance import described, differing, machine
from fambav.experiments.results import CSV, JSON, MARKDOWN, Record, Results
from fambav.experiments.summary import table
from fambav.ops import check_environment
from fambav.table import Table
from fambav.tasks import Metric
from fambav.training.network import layout

_NAMED = 6  # failed cells that an error names
_PAUSE = 0.05  # seconds between two polls of the processes
_QUIET = 30  # seconds after which an epoch of a running cell is reported


def run(
    grid: Grid,
    folder: Path,
    *,
    jobs: int,
    keep: bool,
    report: Callable[[str], None],
    mixed: bool = False,
) -> Results:
    """Carry out what is missing of a grid.

    The tables in `folder` are written anew after each cell.

    Args:
        grid: What to carry out.
        folder: Gets the cells and the tables, results.csv, results.json and results.md.
        jobs: Processes that work at once, at least 1.
        keep: Whether the checkpoints of trained cells stay.
        report: Takes a line for each finished cell, and for epochs of one that takes long.
        mixed: Whether cells may come from several machines; the table then has no time and memory.

    Returns:
        The records of all cells.

    Raises:
        ValueError: If another process works in the folder, or its cells come from another machine.
        OSError: If the folder cannot be written.
        BackendError: If the environment forces a scan that cannot run.
    """
    check_environment()
    with locked(folder):
        run_dir.prepare(folder)
        about = run_dir.environment(jobs=jobs)
        records = {c.name: known for c in grid.cells if (known := finished(c, folder))}
        left = [cell for cell in grid.cells if cell.name not in records]
        if not mixed:
            _refuse_mixed(folder, records, about if left else None)
        report(f"{len(records)} of {len(grid.cells)} cells are finished")
        results = Results(grid, records)
        _write(results, folder, mixed=mixed)
        for process in _perform(left, folder, about, jobs, report):
            cell, known = process.cell, process.result(keep=keep)
            records[cell.name] = known
            _write(results, folder, mixed=mixed)
            line = f"{_line(cell, known, grid.task.primary)}{_time_left(results, jobs)}"
            report(f"[{len(records)}/{len(grid.cells)}] {line}")
        if not mixed:
            _refuse_mixed(folder, records, None)  # processes may have had GPUs of several kinds
    return results


def refuse_failures(results: Results, folder: Path) -> None:
    """Name the cells that failed.

    Args:
        results: The records.
        folder: Where the tables are.

    Raises:
        ValueError: If there are any.
    """
    if failed := results.failed:
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise ValueError(
            f"{len(failed)} of {len(results.grid.cells)} cells failed: "
            f"{'; '.join(failed[:_NAMED])}{more}; {folder / CSV} has the reasons"
        )


def cost(grid: Grid, folder: Path, *, jobs: int) -> Table:
    """Return what a grid is to train, without training or writing anything.

    An epoch in which half of the token-layers are left counts as half an epoch.

    Args:
        grid: What is to be carried out.
        folder: As for `run`; what is finished there costs nothing.
        jobs: Likewise.

    Raises:
        ValueError: If a model cannot be built, or its tokens not be reduced as a row wants it.
    """
    records = {c.name: known for c in grid.cells if (known := finished(c, folder))}
    rows, total = [], 0.0
    for row in grid.rows:
        own = [cell for cell in grid.cells if cell.row.name == row.name]
        schedule = layout(own[-1].config).schedule
        share = 1.0 if schedule is None else schedule.share
        left = [cell for cell in own if cell.name not in records]
        epochs = sum(cell.config.optim.epochs for cell in left if cell.phase != FREE)
        total += share * epochs
        shown = "-" if schedule is None else f"{share:.2f}"
        rows.append([*row.labels, shown, str(len(own)), str(len(left)), str(epochs)])
    time_left = _time_left(Results(grid, records), jobs).removeprefix("; ")
    if len(records) < len(grid.cells):
        time_left = time_left or "time: not known before a cell of each phase is finished"
    notes = [
        f"epochs left, in token-layers: as many as {total:.1f} without reduction",
        *filter(None, [time_left]),
        "dry run: nothing was trained or written",
    ]
    head = (*grid.names, "token-layers", "cells", "cells left", "epochs left")
    return Table(
        head=head,
        rows=rows,
        names=len(grid.names),
        title=grid.title,
        notes=notes,
        values=[head, *rows],
        document=[dict(zip(head, row, strict=True)) for row in rows],
    )


def _perform(
    left: list[Cell], folder: Path, about: Record, jobs: int, report: Callable[[str], None]
) -> Iterator[Process]:
    """Carry out cells, at most `jobs` at once; yield each process when it has ended.

    Cells without a start come first, then, when all of these are done, those that start from one.
    """
    free = slots(jobs)
    running: list[Process] = []
    reported = time.monotonic()
    try:
        for waiting in ([c for c in left if not c.start], [c for c in left if c.start]):
            while waiting or running:
                while waiting and free:
                    running.append(Process(waiting.pop(0), folder, free.pop(0), about))
                ended = [process for process in running if not process.running]
                for process in ended:
                    running.remove(process)
                    free.append(process.slot)
                    yield process
                    reported = time.monotonic()
                if time.monotonic() > reported + _QUIET:
                    for line in filter(None, (process.progress() for process in running)):
                        report(line)
                    reported = time.monotonic()  # else logs are read at every poll
                if not ended:
                    time.sleep(_PAUSE)
    finally:
        for process in running:
            process.end()


def _time_left(results: Results, jobs: int) -> str:
    """The estimated time left, from finished cells; empty while a phase has none."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for known in results.records.values():
        if known["error"] is None and known["wall_seconds"] is not None:
            seconds[known["phase"]].append(known["wall_seconds"])
    left = [cell.phase for cell in results.grid.cells if cell.name not in results.records]
    if not left or not set(left) <= seconds.keys():
        return ""
    return f"; {sum(fmean(seconds[phase]) for phase in left) / jobs / 60:.1f} min left"


def _write(results: Results, folder: Path, *, mixed: bool) -> None:
    """Write the table, and what programs read."""
    drawn = table(results, mixed=mixed)
    for name, form in ((CSV, "csv"), (JSON, "json"), (MARKDOWN, "markdown")):
        write_text(folder / name, f"{drawn.render(form)}\n")


def _refuse_mixed(folder: Path, records: dict[str, Record], here: Record | None) -> None:
    """Refuse cells of several machines, those that are to run here among them.

    A cell's number of threads is one of its settings, so the number of the grid's own process
    does not count.
    """
    machines = [*(known["about"] for known in records.values()), *([] if here is None else [here])]
    differences = differing(machine(about, without=["threads"]) for about in machines)
    if differences:
        raise ValueError(
            f"cells in {folder} and those to run differ in {described(differences)}, expected one "
            "machine and one number of jobs; --mixed leaves time and memory out of the table"
        )


def _line(cell: Cell, known: Record, primary: Metric) -> str:
    if known["error"] is not None:
        return f"{cell.name}: failed: {known['error']}"
    value = f"{known['figures'][primary.name]:.{primary.digits}f} {primary.unit}".rstrip()
    return f"{cell.name}: {value} in {known['wall_seconds']:.1f} s"
