"""One cell of a grid: carry it out, and what it leaves in its folder.

cell.json      the settings, written first: a folder begun with others is emptied
output.txt     what the run printed, and the traceback of a failure
log.txt, ...   what every run leaves, see engine.record
result.json    the figures, or the error, written last
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from fambav import comparison
from fambav.build.jobs import opened
from fambav.config import Config
from fambav.engine.checkpoint import write_text
from fambav.engine.record import BEST, CHECKPOINT, WEIGHTS
from fambav.experiments.grid import DENSE, FREE, Cell

Record = dict[str, Any]

_BEGUN, _OUTPUT, _RESULT = "cell.json", "output.txt", "result.json"
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Task(NamedTuple):
    """A cell to carry out.

    Attributes:
        cell: The cell.
        folder: The grid's folder.
        keep: Whether checkpoints stay.
        about: The machine and the versions, for the record.
    """

    cell: Cell
    folder: Path
    keep: bool
    about: Record


def finished(cell: Cell, folder: Path) -> Record | None:
    """Return what a cell came to, None if it has not been finished with the present settings.

    Args:
        cell: The cell.
        folder: The grid's folder.
    """
    place = folder / cell.place
    if cell.phase == DENSE and not (place / WEIGHTS).is_file():
        return None
    record = _json(place / _RESULT)
    if record is None or record.get("error") is not None:
        return None
    return record if cell.agrees(record.get("settings")) else None


def perform(task: Task) -> Record:
    """Carry out a cell and write its result, which names the error if there was one."""
    cell, place = task.cell, task.folder / task.cell.place
    _make(place, cell)
    start = time.perf_counter()
    figures: Record = {}
    failure = None
    with (
        (place / _OUTPUT).open("a", encoding="utf-8") as output,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        try:
            figures = _figures(task, place)
        except _FAILURES as error:
            traceback.print_exc()
            failure = " ".join(str(error).split()) or type(error).__name__
    return _write(task, figures, failure, time.perf_counter() - start)


def lost(task: Task, status: int | None) -> Record:
    """Write the result of a cell whose process has ended, and return it.

    Args:
        task: The cell.
        status: Exit status of the process.
    """
    reason = f"process ended with status {status}, expected a result; see {_OUTPUT}"
    (task.folder / task.cell.place).mkdir(parents=True, exist_ok=True)
    return _write(task, {}, reason, None)


def _make(place: Path, cell: Cell) -> None:
    """Make the folder of a cell; one that was begun with the same settings stays as it is."""
    begun = _json(place / _BEGUN)
    if begun is None or not cell.agrees(begun):
        if place.exists():
            shutil.rmtree(place)
        place.mkdir(parents=True)
        write_text(place / _BEGUN, json.dumps(cell.settings) + "\n")


def _figures(task: Task, place: Path) -> Record:
    cell, weights = task.cell, ""
    if cell.start is not None:
        if finished(cell.start, task.folder) is None:
            raise ValueError(f"start is {cell.start.name}, expected a cell that is finished")
        weights = str(task.folder / cell.start.place / WEIGHTS)
    if cell.phase == FREE:
        return _evaluated(cell.config.replace(finetune=weights, eval=True))
    return _trained(
        cell.config.replace(finetune=weights, resume="auto", output_dir=str(place)), place
    )


def _evaluated(config: Config) -> Record:
    with opened(config) as job:
        plan, scores = job.sketch.schedule, job.evaluate()
    return {"acc1": scores.acc1, "token_layers": plan and plan.share}


def _trained(config: Config, place: Path) -> Record:
    with opened(config) as job:
        job.train()
    run, epochs = comparison.read(place), config.optim.epochs
    return {
        "acc1": run.acc1,
        "token_layers": run.share,
        "epochs": epochs,
        "seconds": round(run.seconds, 3),
        "seconds_per_epoch": round(run.seconds / epochs, 3),
        "images_per_second": run.speed,
        "memory_mib": run.memory_mib,
        "memory_kind": run.memory_kind,
    }


def _write(task: Task, figures: Record, failure: str | None, seconds: float | None) -> Record:
    """Write the result, then remove the checkpoints that nothing needs any more."""
    cell, place = task.cell, task.folder / task.cell.place
    record = {
        "row": cell.row.name,
        "seed": cell.seed,
        "phase": cell.phase,
        "figures": figures,
        "error": failure,
        "wall_seconds": None if seconds is None else round(seconds, 3),
        "settings": cell.settings,
        "about": task.about,
    }
    write_text(place / _RESULT, json.dumps(record, indent=1) + "\n")
    if failure is None and not task.keep:
        for name in (CHECKPOINT, BEST) if cell.phase == DENSE else (CHECKPOINT, BEST, WEIGHTS):
            (place / name).unlink(missing_ok=True)
    return record


def _json(path: Path) -> Record | None:
    """What a file of ours holds; None if it is missing or damaged, since it is then made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
