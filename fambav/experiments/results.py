"""One cell of a grid: carry it out, and what it leaves in its folder.

cell.json      the settings, written first: a folder begun with others is emptied
machine.json   where it was begun: a folder begun elsewhere is emptied too
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

import torch

from fambav import comparison
from fambav.build.jobs import Job, opened
from fambav.build.network import model
from fambav.build.updates import precision
from fambav.comparison.likeness import differing, machine
from fambav.config import Config
from fambav.engine import record
from fambav.engine.checkpoint import write_text
from fambav.engine.record import CHECKPOINT, KEPT, WEIGHTS
from fambav.experiments.grid import DENSE, FREE, Cell

Record = dict[str, Any]

_BEGUN, _MACHINE, _OUTPUT, _RESULT = "cell.json", "machine.json", "output.txt", "result.json"
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
    known = _json(place / _RESULT)
    if known is None or known.get("error") is not None:
        return None
    return known if cell.agrees(known.get("settings")) else None


def perform(task: Task) -> Record:
    """Carry out a cell and write its result, which names the error if there was one."""
    place = task.folder / task.cell.place
    own = {"threads": task.cell.config.run.threads, "gpu": record.gpu()}  # not the grid's process's
    task = task._replace(about={**task.about, **own})
    _make(place, task)
    resumed = (place / CHECKPOINT).is_file()
    began, start = now(), time.perf_counter()
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
    seconds = round(time.perf_counter() - start, 3)
    times = {"wall_seconds": seconds, "started": began, "ended": now(), "resumed": resumed}
    return _write(task, figures, failure, times)


def lost(task: Task, status: int | None) -> Record:
    """Write the result of a cell whose process has ended, and return it.

    Args:
        task: The cell.
        status: Exit status of the process.
    """
    reason = f"process ended with status {status}, expected a result; see {_OUTPUT}"
    (task.folder / task.cell.place).mkdir(parents=True, exist_ok=True)
    return _write(task, {}, reason, {"wall_seconds": None})


def now() -> str:
    """Return the time as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _make(place: Path, task: Task) -> None:
    """Make the folder of a cell; one begun here with the same settings stays as it is."""
    begun, where = _json(place / _BEGUN), _json(place / _MACHINE)
    here = machine(task.about)
    if begun is None or not task.cell.agrees(begun) or differing([where or {}, here]):
        if place.exists():
            shutil.rmtree(place)
        place.mkdir(parents=True)
        write_text(place / _BEGUN, json.dumps(task.cell.settings) + "\n")
        write_text(place / _MACHINE, json.dumps(here) + "\n")


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
    return {
        "acc1": scores.acc1,
        "acc5": scores.acc5,
        "token_layers": plan and plan.share,
    }


def _trained(config: Config, place: Path) -> Record:
    with opened(config) as job:
        _warm_up(job)
        job.train()
    run, epochs = comparison.read(place), config.optim.epochs
    return {
        "acc1": run.acc1,
        "acc5": run.acc5,
        "token_layers": run.share,
        "epochs": epochs,
        "seconds": round(run.seconds, 3),
        "seconds_per_epoch": round(run.seconds / epochs, 3),
        "images_per_second": run.speed,
        "memory_mib": run.memory_mib,
        "memory_kind": run.memory_kind,
    }


def _warm_up(job: Job) -> None:
    """Run a batch through a model of the cell's, so that no row pays for what a process does once.

    Kernels are compiled or loaded when they first run: seconds, which the first cell of each
    process would show as time of training.
    """
    config, device = job.config, job.group.device
    net = model(config, num_classes=job.data.num_classes).to(device).train()
    images = torch.zeros(config.optim.batch_size, 3, *job.sketch.input_size, device=device)
    with precision(config, job.group).autocast():
        total = net(images).float().sum()
    total.backward()


def _write(task: Task, figures: Record, failure: str | None, times: Record) -> Record:
    """Write the result, then remove the checkpoints that nothing needs any more."""
    cell, place = task.cell, task.folder / task.cell.place
    known = {
        "row": cell.row.name,
        "seed": cell.seed,
        "phase": cell.phase,
        "figures": figures,
        "error": failure,
        **times,
        "settings": cell.settings,
        "about": task.about,
    }
    write_text(place / _RESULT, json.dumps(known, indent=1) + "\n")
    if failure is None and not task.keep:
        for name in (*KEPT, *(() if cell.phase == DENSE else (WEIGHTS,))):
            (place / name).unlink(missing_ok=True)
    return known


def _json(path: Path) -> Record | None:
    """What a file of ours holds; None if it is missing or damaged, since it is then made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
