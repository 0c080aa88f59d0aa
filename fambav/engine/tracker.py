"""The record of each epoch, sent to an experiment tracker; a run goes on if that fails.

TensorBoard's events are written in any case, see `fambav.engine.events`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fambav.engine.checkpoint import write_text
from fambav.json_files import read_object

_RUN = "tracker.json"
_FORM = {"tracker": str, "run": str}

Log = Callable[[Mapping[str, float], int], None]
Close = Callable[[], None]


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ValueError: If it is not.
    """
    if name in _ADAPTERS and find_spec(name) is None:
        raise ValueError(f"tracker is {name!r}, expected an installed one; pip install {name}")


class Tracker:
    """A run of a tracker, which a resumed run goes on with.

    Args:
        name: "wandb" or "mlflow"; any other sends nothing.
        folder: The run folder, there already.
        settings: Of the run.
        warn: Called with a line if something cannot be sent; nothing more is sent then.
    """

    def __init__(
        self, name: str, folder: Path, settings: Mapping[str, Any], *, warn: Callable[[str], None]
    ) -> None:
        self._name, self._warn = name, warn
        self._log: Log | None = None
        self._close: Close = lambda: None
        opened = self._try(_open, name, folder, settings) if name in _ADAPTERS else None
        if opened is not None:
            self._log, self._close = opened

    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        """Send the numbers of an epoch, under their keys in log.txt."""
        if self._log is not None:
            self._try(self._log, values, epoch)

    def close(self) -> None:
        """End the run there."""
        self._try(self._close)

    def _try(self, call: Callable[..., Any], *given: Any) -> Any:
        try:
            return call(*given)
        except Exception as error:  # noqa: BLE001  a client's or network's failure ends no training
            self._log, self._close = None, lambda: None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._warn(f"warning: nothing more is sent to {self._name} ({reason})")
            return None


def _open(name: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Log, Close]:
    """Begin a run of a tracker, or go on with the one that the folder names."""
    run, log, close = _ADAPTERS[name](folder, _known_run(folder, name), settings)
    write_text(folder / _RUN, json.dumps({"tracker": name, "run": run}) + "\n")
    return log, close


def _known_run(folder: Path, tracker: str) -> str | None:
    """Return the tracker's own name of the run in a folder, None if there is none yet."""
    path = folder / _RUN
    if not path.is_file():
        return None
    known = read_object(path, "a tracker and its run", _FORM)
    return str(known["run"]) if known["tracker"] == tracker else None


def _wandb(folder: Path, run: str | None, settings: Mapping[str, Any]) -> tuple[str, Log, Close]:
    import wandb

    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "fambav"),
        name=folder.resolve().name,
        id=run,
        resume="allow",
        dir=str(folder),
        config=dict(settings),
    )
    return opened.id, lambda values, epoch: opened.log(dict(values), step=epoch), opened.finish


def _mlflow(folder: Path, run: str | None, settings: Mapping[str, Any]) -> tuple[str, Log, Close]:
    import mlflow

    opened = mlflow.start_run(run_id=run, run_name=folder.resolve().name)
    if run is None:
        mlflow.log_params(dict(settings))
    log = mlflow.log_metrics
    return opened.info.run_id, lambda values, epoch: log(dict(values), step=epoch), mlflow.end_run


# Each returns the name of the run there, what gets an epoch, and what ends the run.
_ADAPTERS: dict[str, Callable[[Path, str | None, Mapping[str, Any]], tuple[str, Log, Close]]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
}
