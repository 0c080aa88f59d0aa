"""The run directory: its files, and the records that are written there.

log.txt                one JSON object per epoch, with DeiT's keys and more
metrics.csv            the same numbers as a table
events.*               the same for TensorBoard, and the loss of every update
tracker.json           the name of the run at another tracker, if there is one
*.yaml, *.json         settings, environment, and which tokens were removed
checkpoint.pth         the state of the run, see `checkpoint`; the one before; the best
model.safetensors      the weights alone
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fambav.engine.checkpoint import CheckpointError, naming, write_text
from fambav.engine.events import Events
from fambav.engine.tracker import Tracker
from fambav.json_files import parse_object
from fambav.short_repr import short_repr

Record = dict[str, Any]

CHECKPOINT, BEST, WEIGHTS = "checkpoint.pth", "best_checkpoint.pth", "model.safetensors"
PREVIOUS = "previous_checkpoint.pth"
KEPT = (CHECKPOINT, PREVIOUS, BEST)  # checkpoints of a run, the newest first
DESCRIPTION, COMPRESSED = "config.json", "model.pth"  # of exported folders
_LOG, _TABLE = "log.txt", "metrics.csv"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "triton")
_ROOT = Path(__file__).resolve().parents[2]


def weights_file(path: Path) -> Path:
    """Return the file that stands for a path wherever weights are read: a file is itself.

    A run folder means its best checkpoint, that of the epoch with the best primary metric on the
    held-out samples.  That was measured on the raw weights, so these are taken from it and not
    their moving average, which `main.py --eval` scores beside them.  A folder without a complete
    epoch means its last checkpoint, one without checkpoints its `model.safetensors`.  An exported
    folder means its weights.

    Raises:
        CheckpointError: If a folder holds none of these, or there can be no such path.
    """
    try:
        if not path.is_dir():
            return path
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(
            f"path is {short_repr(str(path))}, expected that of a file or folder; {error.strerror}"
        ) from None
    names = (WEIGHTS, COMPRESSED) if (path / DESCRIPTION).is_file() else (BEST, CHECKPOINT, WEIGHTS)
    for name in names:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} holds no {names[0]}, expected a run folder or one exported as safetensors or hf"
    )


def prepare(folder: Path) -> None:
    """Make `folder` and see that files can be written in it.

    Raises:
        OSError: If not; it names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".tmp-{os.getpid()}"
    trial.touch()
    for path in folder.glob(".tmp-*"):  # of runs that were killed, since no other one is running
        path.unlink()


def set_aside(folder: Path) -> Path | None:
    """Move the files of an earlier run in `folder` to a folder inside it.

    Returns:
        That folder, or None if there was no earlier run.
    """
    names = (_LOG, _TABLE, CHECKPOINT, PREVIOUS, BEST, WEIGHTS)
    old = [path for name in names if (path := folder / name).exists()]
    if not old:
        return None
    kept = folder / time.strftime("earlier-%Y%m%d-%H%M%S")
    kept.mkdir()
    for path in (*old, *folder.glob("events.*"), *folder.glob("*.json"), *folder.glob("*.yaml")):
        path.rename(kept / path.name)
    return kept


class Recorder:
    """Writes the numbers of a run, one process only.

    Args:
        folder: The run folder, there already.
        history: Records of the epochs before, as the checkpoint has them: log.txt, metrics.csv and
            the events are made to agree.  Only the time of the checkpoint's own save is not
            in it; where log.txt has it, it is filled in.
        updates: How many updates are done.
        tracker: Gets the numbers of each epoch too.
        warn: Gets a line for what cannot be written, and for a file that said something else.

    Attributes:
        unwritten: Why log.txt or metrics.csv lacks an epoch; None if neither does.
    """

    def __init__(
        self,
        folder: Path,
        history: Sequence[Record],
        *,
        updates: int,
        tracker: Tracker | None = None,
        warn: Callable[[str], None],
    ) -> None:
        self.folder, self._tracker, self._warn = folder, tracker, warn
        self._records = list(history)
        log = _lines(folder / _LOG)
        for record, line in zip(history, log, strict=False):
            _fill_in(record, line)
        for name, wanted in self._texts().items():
            if _differs(_lines(folder / name), wanted):
                warn(f"{name} differs from the checkpoint's history; it is written anew from that")
        old = sorted(folder.glob("events.*")) if (folder / _LOG).exists() else []  # of this run
        self._rewrite()
        self.unwritten: OSError | None = None
        known = {
            (f"epoch/{name}", record["epoch"]): value
            for record in history
            for name, value in _scalars(record).items()
        }
        self._events = Events(folder, old=old, updates=updates, epochs=known, warn=warn)

    def epoch(self, record: Record) -> None:
        """Add the record of one epoch; if it cannot be written, it is with the next one."""
        self._records.append(record)
        try:
            if self.unwritten is None:
                self._add(record)
            else:
                self._rewrite()
            self.unwritten = None
        except OSError as error:
            self.unwritten = error
            self._warn(f"warning: {_LOG} could not be written ({error.strerror})")
        for name, value in _scalars(record).items():
            self._events.add("scalar", f"epoch/{name}", value, record["epoch"])
        self._events.flush()
        if self._tracker is not None:
            self._tracker.epoch(_scalars(record), record["epoch"])

    def updates(self, done: int, losses: Sequence[float], lr: float) -> None:
        """Add the losses of the last updates, of which `done` are made, and the learning rate."""
        for number, loss in enumerate(losses, start=done - len(losses)):
            self._events.add("scalar", "update/loss", loss, number)
        self._events.add("scalar", "update/lr", lr, done - 1)

    def picture(self, name: str, pixels: NDArray[np.uint8], epochs: int) -> None:
        """Add a picture, (3, height, width), after so many epochs."""
        self._events.add("image", name, pixels, epochs)

    def flush(self) -> None:
        """Write what has been added so far."""
        self._events.flush()

    def close(self) -> None:
        """Finish the files."""
        self._events.close()
        if self._tracker is not None:
            self._tracker.close()

    def _add(self, record: Record) -> None:
        table = self.folder / _TABLE
        _append(table, ("" if table.stat().st_size else _head(record)) + _row(record))
        _append(self.folder / _LOG, _line(record))

    def _rewrite(self) -> None:
        for name, lines in self._texts().items():
            write_text(self.folder / name, "".join(lines))

    def _texts(self) -> dict[str, list[str]]:
        """The lines of both files."""
        records = self._records
        table = [*map(_head, records[:1]), *map(_row, records)]
        return {_LOG: list(map(_line, records)), _TABLE: table}


def environment(**more: Any) -> Record:
    """Describe the machine, the versions and the command, with `more` entries added."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "fambav": _version("fambav") or "not installed",
        "commit": _commit(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu(),
        "cuda": torch.version.cuda,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **more,
    }


def gpu() -> str | None:
    """Return the name of the GPU that this process computes on if it may; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _cpu() -> str:
    """The model of the processor as the system names it; its architecture if it does not."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else ()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source, with a plus sign if files differ from it."""
    if not (_ROOT / ".git").exists():
        return None
    git = ("git", "-C", str(_ROOT))
    try:
        head = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True)
        dirty = subprocess.run((*git, "status", "--porcelain"), capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if dirty.stdout else "") if head.returncode == 0 else None


def _lines(path: Path) -> list[str]:
    """The complete lines of a file; one that a crash cut short is no line."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _fill_in(record: Record, line: str) -> None:
    """Take the time of a checkpoint's own save, which is 0 in it, from the line of the epoch."""
    try:
        seconds = parse_object(line, _LOG, "the record of an epoch", constants=True)["save_seconds"]
    except (ValueError, LookupError):
        return
    if record.get("save_seconds") == 0 and isinstance(seconds, float) and math.isfinite(seconds):
        record["save_seconds"] = seconds


def _differs(lines: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a line differs; those of epochs that are not complete do not count."""
    return any(one != other for one, other in zip(lines, wanted, strict=False))


def _append(path: Path, text: str) -> None:
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _head(record: Record) -> str:
    return _csv(name for name, value in record.items() if not isinstance(value, dict))


def _row(record: Record) -> str:
    values = (value for value in record.values() if not isinstance(value, dict))
    return _csv(" ".join(map(str, v)) if isinstance(v, list) else v for v in values)


def _csv(cells: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _scalars(record: Record) -> dict[str, float]:
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k != "epoch"}
