"""A cell in a process of its own, and the files in its folder.

cell.json      the settings, written first: a folder begun with others is emptied
machine.json   where it was begun: a folder begun elsewhere is emptied too
cell.yaml      what the process is to do, as `main.py --config` takes it
output.txt     what it printed, and the traceback of a failure
log.txt, ...   what every run leaves, see engine.run_dir
figures.json   the figures, or the error, as the process wrote them
result.json    the same with settings, machine and times, written last
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from statistics import fmean

import torch

from fambav.config import Config, ConfigError
from fambav.engine import run_dir
from fambav.engine.checkpoint import write_text
from fambav.engine.run_dir import CHECKPOINT, KEPT, WEIGHTS
from fambav.experiments.cell import FIGURES, OUTPUT, SETTINGS, perform
from fambav.experiments.grid import FREE, UNREDUCED, Cell
from fambav.experiments.provenance import differing, machine
from fambav.experiments.results import Record
from fambav.experiments.runs import LOG, read_log
from fambav.json_files import Form, read_object
from fambav.tasks import task_of

_BEGUN, _MACHINE, _RESULT = "cell.json", "machine.json", "result.json"
_OPEN = (str, type(None))
_RECORD = {  # what tables read of a result
    "phase": str,
    "figures": {str: (float, *_OPEN)},
    "error": _OPEN,
    "wall_seconds": (float, type(None)),
    "settings": dict,
    "about": {
        "fambav": str,
        "python": str,
        "packages": {str: str},
        "commit": _OPEN,
        "platform": str,
        "cpu_count": (int, type(None)),
        "gpu": _OPEN,
        "jobs": int,
        "started": str,
    },
}
_VISIBLE = "CUDA_VISIBLE_DEVICES"

Slot = tuple[dict[str, str], str | None]  # variables of a process, its GPU: see `slots`

# Importing torch takes seconds: one process does it, computes nothing, and is forked for each cell.
# What cannot be imported, such as kernels whose compiler is not installed, it leaves to the cells.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([perform.__module__, "fambav.ops.numba"])


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get(_VISIBLE)
    if not count or named is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in named.split(",")][:count]


def slots(jobs: int) -> list[Slot]:
    """Return what each of several processes has: its own GPU, if there are several.

    More processes than GPUs share them in turn; one alone sees what this process sees.

    Returns:
        Variables that it finds in its environment besides what is in ours, and the name of the GPU
        it computes on, None without one.
    """
    names = gpus()
    if jobs == 1 or len(names) < 2:
        return [({}, run_dir.gpu())] * jobs
    numbers = [job % len(names) for job in range(jobs)]
    return [({_VISIBLE: names[n]}, torch.cuda.get_device_name(n)) for n in numbers]


def finished(cell: Cell, folder: Path) -> Record | None:
    """Return the record of a cell, None if it is not finished with the present settings.

    Args:
        cell: The cell.
        folder: The grid's folder.
    """
    cell_folder = folder / cell.folder
    if cell.phase == UNREDUCED and not (cell_folder / WEIGHTS).is_file():
        return None
    known = _json(cell_folder / _RESULT, _RECORD)
    if known is None or known["error"] is not None:
        return None
    texts = {name for name, value in known["figures"].items() if isinstance(value, str)}
    return known if texts <= {"memory_kind"} and cell.agrees(known["settings"]) else None


class Process:
    """A process that carries out a cell; it does not outlive this one, however that ends.

    Args:
        cell: The cell.
        folder: The grid's folder.
        slot: Its GPU and environment.
        about: The machine and the versions, for the record.

    Attributes:
        cell, slot: The same.
    """

    def __init__(self, cell: Cell, folder: Path, slot: Slot, about: Record) -> None:
        self.cell, self.slot, self._folder = cell, slot, folder / cell.folder
        variables, gpu = slot
        own = {"threads": cell.config.run.threads, "gpu": gpu}  # not the grid's process's
        self._about = {**about, **own}
        self._prepare()
        self._resumed = (self._folder / CHECKPOINT).is_file()
        self._began, self._start = now(), time.perf_counter()
        self._process = _CONTEXT.Process(target=perform, args=(self._folder, variables))
        self._reported = -1  # epochs that `progress` has reported
        self._refusal: str | None = None  # why there is nothing to start
        if cell.start is not None and finished(cell.start, folder) is None:
            self._refusal = f"start is {cell.start.name}, expected a cell that is finished"
            return
        try:
            settings = self._settings(folder)
        except ConfigError as error:
            self._refusal = str(error)
            return
        write_text(self._folder / SETTINGS, settings.to_yaml())
        self._process.start()

    @property
    def running(self) -> bool:
        """Whether it still works."""
        return self._refusal is None and self._process.is_alive()

    def progress(self) -> str | None:
        """Return a line about its last epoch, or its log before one; None without news."""
        log, name = self._folder / LOG, self.cell.name
        epochs = read_log(log) if log.is_file() and log.stat().st_size else []
        if len(epochs) == self._reported:
            return None
        self._reported, planned = len(epochs), self.cell.config.optim.epochs
        if not epochs:
            return f"{name}: in its first epoch; {self._folder / OUTPUT} has its log"
        primary = task_of(self.cell.config.data.data_set).primary
        value = f"{epochs[-1][primary.key]:.{primary.digits}f} {primary.unit}".rstrip()
        minutes = fmean(epoch["train_seconds"] for epoch in epochs) / 60
        left = f"{minutes * (planned - len(epochs)):.1f} min left"
        return f"{name}: epoch {len(epochs)} of {planned}, {value}; {left}"

    def end(self) -> None:
        """End the process, whatever it works on."""
        if self._refusal is None:
            self._process.terminate()
            self._process.join()

    def result(self, *, keep: bool) -> Record:
        """Write the result of a process that has ended, and return it.

        Args:
            keep: Whether its checkpoints stay, though nothing needs them any more.
        """
        outcome = _json(self._folder / FIGURES)
        if self._refusal is not None:
            outcome = {"error": self._refusal}
        elif outcome is None:
            status, hint = self._process.exitcode, f"expected a result; see {OUTPUT}"
            outcome = {"error": f"process ended with status {status}, {hint}"}
        error = outcome.get("error")
        known = {
            "row": self.cell.row.name,
            "seed": self.cell.seed,
            "phase": self.cell.phase,
            "figures": outcome.get("figures", {}),
            "error": error,
            "wall_seconds": round(time.perf_counter() - self._start, 3),
            "started": self._began,
            "ended": now(),
            "resumed": self._resumed,
            "settings": self.cell.settings,
            "about": self._about,
        }
        write_text(self._folder / _RESULT, json.dumps(known, indent=1) + "\n")
        if error is None and not keep:
            for name in (*KEPT, *(() if self.cell.phase == UNREDUCED else (WEIGHTS,))):
                (self._folder / name).unlink(missing_ok=True)
        return known

    def _prepare(self) -> None:
        """Make the folder; one begun here with the same settings stays as it is."""
        folder, here = self._folder, machine(self._about)
        begun, where = _json(folder / _BEGUN), _json(folder / _MACHINE)
        if begun is None or not self.cell.agrees(begun) or differing([where or {}, here]):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            write_text(folder / _BEGUN, json.dumps(self.cell.settings) + "\n")
            write_text(folder / _MACHINE, json.dumps(here) + "\n")
        (folder / FIGURES).unlink(missing_ok=True)

    def _settings(self, folder: Path) -> Config:
        """What the process is to do."""
        start = self.cell.start
        weights = "" if start is None else str(folder / start.folder / WEIGHTS)
        where = {"resume": "auto", "output_dir": str(self._folder)}
        more = {"eval": True} if self.cell.phase == FREE else where
        return self.cell.config.replace(finetune=weights, **more)


def now() -> str:
    """Return the time as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _json(path: Path, form: Form = dict) -> Record | None:
    """What a file of ours holds; None if it is missing or damaged, since it is then made again."""
    try:
        return read_object(path, "what the process of a cell writes", form)
    except (FileNotFoundError, ValueError):
        return None
