"""What is known of an exported model, for programs: config.json.

The keys at the top are those of timm's own files; what only this package knows is under "fambav".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import fambav
from fambav.config import affecting
from fambav.experiments import log_metrics, read_environment, read_log
from fambav.models import TimmModel
from fambav.tasks import task_of
from fambav.training.inference import LoadedRun
from fambav.training.network import model_args

_INPUTS = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes")


def describe(run: LoadedRun, kind: str) -> dict[str, Any]:
    """Return what `config.json` holds.

    Args:
        run: The model.
        kind: The format.

    Raises:
        ValueError: If the log beside the weights is damaged.
    """
    net: Any = run.net
    plan = None
    reduction = getattr(net, "reduction", None)  # of a backbone, or of that inside
    if reduction is not None:
        plan = {**asdict(reduction.schedule), "share": reduction.schedule.share}
    return {
        "architecture": run.config.model.model.removeprefix("timm/"),
        "num_classes": run.num_classes,
        "num_features": getattr(net, "num_features", None),
        "label_names": run.class_names,
        **({"model_args": model_args(run.config, net)} if isinstance(net, TimmModel) else {}),
        "pretrained_cfg": {
            "fixed_input_size": True,
            **{name: net.pretrained_cfg[name] for name in _INPUTS if name in net.pretrained_cfg},
        },
        "fambav": {
            "version": fambav.__version__,
            "format": kind,
            "class_token": run.config.model.class_token,
            "settings": _settings(run),
            "plan": plan,
            "run": _training(run),
        },
    }


def facts(run: LoadedRun) -> dict[str, Any]:
    """Return what the file of weights says beside them."""
    return {
        "config": _settings(run),
        "class_token": run.config.model.class_token,
        "grid": getattr(run.net, "grid", None),
        "num_classes": run.num_classes,
        "class_names": run.class_names,
        "mean": list(run.mean),
        "std": list(run.std),
        **{name: v for name, v in run.state.facts.items() if name == "variates"},
        "torch": run.state.facts.get("torch", "unknown"),
        **_changes(run),
    }


def _settings(run: LoadedRun) -> dict[str, Any]:
    """Return the settings that the model is built from, and how its images are made."""
    names = affecting("model") | {"data_set", "data_stats"}
    kept = {name: value for name, value in run.config.flat().items() if name in names}
    if kept["fusion_strategy"] == "none" and kept["reduction"] != "none":
        del kept["fusion_strategy"]
    return kept


def _training(run: LoadedRun) -> dict[str, Any]:
    """Return how the weights were trained, by their own history or the files beside them.

    Epochs count from 1.  The metrics are those of the raw weights on the held-out samples, by their
    names.  What no file says is None.  The log counts only where the weights' own file, whose
    digest was checked, has no history.
    """
    folder, entries = run.source.parent, run.state.entries
    log, history = folder / "log.txt", entries.get("history")
    if history is None and log.is_file():
        history = read_log(log) if log.stat().st_size else []
    known = history is not None
    number = entries.get("epoch", history[-1].get("epoch") if history else None) if known else None
    record: Mapping[str, Any] = next((e for e in history or () if e.get("epoch") == number), {})
    about = read_environment(folder) if known else {}
    return {
        "epoch": None if number is None else int(number) + 1,
        "epochs": run.config.optim.epochs if known else None,
        **log_metrics(record, task_of(run.config.data.data_set)),
        "seed": run.config.run.seed if known else None,
        "date": about.get("started"),
        "commit": about.get("commit"),
        "hardware": _hardware(about),
        **_changes(run),
    }


def _changes(run: LoadedRun) -> dict[str, Any]:
    """Return changes of settings in the course of the run; nothing if there were none."""
    changes = run.state.facts.get("changes")
    return {"changes": changes} if changes else {}


def _hardware(about: Mapping[str, Any]) -> str | None:
    if not about:
        return None
    if about.get("gpu") and str(about.get("device", "")).startswith("cuda"):
        return str(about["gpu"])
    threads = about.get("threads")
    name = about.get("cpu", "CPU")
    return f"{name}, {about.get('cpu_count')} cores, {threads} thread{'s' * (threads != 1)}"
