"""What is known of an exported model, for programs: config.json.

The words at the top are those of timm's own files; what only this package knows is under "fambav".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fambav
from fambav.config import affecting
from fambav.experiments import log_metrics, read_environment, read_log
from fambav.models import Backbone
from fambav.tasks import task_of
from fambav.training.entries import fact
from fambav.training.prediction import Pretrained


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of a run say; None where they do not.

    Attributes:
        epoch: Number of the epoch behind which the weights were saved, from 1.
        epochs: Epochs that the run was to have.
        metrics: Those of the task by name, of the raw weights after that epoch.
        seed: Of the run.
        date: When it started.
        commit: Of the source.
        hardware: What it ran on.
    """

    epoch: int | None = None
    epochs: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    seed: int | None = None
    date: str | None = None
    commit: str | None = None
    hardware: str | None = None

    def flat(self) -> dict[str, Any]:
        """Return all of it as JSON holds it, each metric under its own name."""
        entries: dict[str, Any] = {}
        for name, value in vars(self).items():
            entries |= self.metrics if name == "metrics" else {name: value}
        return entries


def run_of(model: Pretrained) -> Run:
    """Read a checkpoint's history and the files beside it; what they do not say is unknown.

    The log counts only where the file has no history of its own, whose digest has been checked.

    Raises:
        ValueError: If the log is damaged.
    """
    folder, state, task = model.source.parent, model.state, task_of(model.config.data.data_set)
    log = folder / "log.txt"
    epochs = state.get("history")
    if epochs is None:
        if not log.is_file():
            return Run(metrics=log_metrics({}, task))
        epochs = read_log(log) if log.stat().st_size else []
    number = state.get("epoch", epochs[-1].get("epoch") if epochs else None)
    record: Mapping[str, Any] = next((e for e in epochs if e.get("epoch") == number), {})
    where = read_environment(folder)
    return Run(
        epoch=None if number is None else int(number) + 1,
        epochs=model.config.optim.epochs,
        metrics=log_metrics(record, task),
        seed=model.config.run.seed,
        date=where.get("started"),
        commit=where.get("commit"),
        hardware=_hardware(where),
    )


def described(model: Pretrained, kind: str) -> dict[str, Any]:
    """Return what `config.json` holds.

    Args:
        model: The model.
        kind: The format.
    """
    net: Any = model.net
    config, plan, images = model.config, None, net.pretrained_cfg
    told = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes")
    if isinstance(net, Backbone):
        plan = {**asdict(net.schedule), "share": net.schedule.share}
    return {
        "architecture": config.model.model.removeprefix("timm/"),
        "num_classes": num_classes(model),
        "num_features": getattr(net, "num_features", None),
        "label_names": model.class_names,
        "pretrained_cfg": {
            "fixed_input_size": True,
            **{name: images[name] for name in told},
        },
        "fambav": {
            "version": fambav.__version__,
            "format": kind,
            "class_token": config.model.class_token,
            "settings": settings(model),
            "plan": plan,
            "run": run_of(model).flat(),
        },
    }


def settings(model: Pretrained) -> dict[str, Any]:
    """Return the settings that the model is built from, and how its images are made."""
    names = affecting("model") | {"data_set", "data_stats"}
    kept = {name: value for name, value in model.config.flat().items() if name in names}
    if kept["fusion_strategy"] == "none" and kept["reduction"] != "none":
        del kept["fusion_strategy"]
    return kept


def input_size(model: Pretrained) -> tuple[int, int, int]:
    """Return channels, height and width of an image."""
    net: Any = model.net
    channels, height, width = net.pretrained_cfg["input_size"]
    return channels, height, width


def num_classes(model: Pretrained) -> int:
    """Return the length of the output."""
    net: Any = model.net
    return int(net.num_classes)


def facts(model: Pretrained) -> dict[str, Any]:
    """Return what the file of weights says beside them."""
    return {
        "config": settings(model),
        "class_token": model.config.model.class_token,
        "grid": getattr(model.net, "grid", None),
        "num_classes": num_classes(model),
        "class_names": model.class_names,
        "mean": list(model.mean),
        "std": list(model.std),
        "torch": fact(model.state, "torch") or "unknown",
    }


def write(folder: Path, told: dict[str, Any]) -> None:
    """Write `config.json` into a folder."""
    text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _hardware(where: dict[str, Any]) -> str | None:
    if not where:
        return None
    if where.get("gpu") and str(where.get("device", "")).startswith("cuda"):
        return str(where["gpu"])
    threads = where.get("threads")
    name = where.get("cpu", "CPU")
    return f"{name}, {where.get('cpu_count')} cores, {threads} thread{'s' * (threads != 1)}"
