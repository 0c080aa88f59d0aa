"""Finished runs: the files in their folders, and the table of several.

Source of the numbers: log.txt, one JSON object per epoch, config.yaml, plan.json and env.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fambav import config
from fambav.experiments.metrics import PRIMARY, difference
from fambav.experiments.provenance import described, differing, fingerprint, machine
from fambav.table import Table
from fambav.tasks import Metric, Task, task_of

_NAMES = ("run", "model", "reduction")
_COST = ("train s", "images/s", "memory MiB")
_TOKENS = ("tokens", "token-layers")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of a run.

    Attributes:
        name: Name of its folder, and how far it came if it is not finished.
        model: Name of the model.
        reduction: How tokens are removed, in short.
        task: The task.
        metrics: Those of the task, of the raw weights after the last epoch, by name; None if the
            log lacks one other than the primary one.
        ema: The primary metric of the averaged weights, None without.
        epochs: How many of them are finished.
        seconds: Training time over those epochs, without evaluation.
        speed: Images per second, the median epoch's.
        memory_mib: Peak memory of the epochs.
        memory_kind: What that counts.
        tokens: Tokens in the last layer, None if the model has no such thing.
        share: Tokens summed over the layers, as a share of what they are without reduction.
        machine: Where it ran; empty without env.json.
        recipe: Fingerprint of its config: without reduction, seed and the locations of files; and
            what was changed in the course of it.
    """

    name: str
    model: str
    reduction: str
    task: Task
    metrics: dict[str, float | None]
    ema: float | None
    epochs: int
    seconds: float
    speed: float
    memory_mib: float
    memory_kind: str
    tokens: int | None
    share: float | None
    machine: dict[str, Any] = field(default_factory=dict, compare=False)
    recipe: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def primary(self) -> Metric:
        """The metric that runs are compared by."""
        return self.task.primary

    def flat(self) -> dict[str, Any]:
        """Return all of it as JSON holds it, each metric under its own name."""
        flat: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "metrics":
                flat |= self.metrics
            elif name != "task":
                flat[f"ema_{self.primary.name}" if name == "ema" else name] = value
        return flat


def read_run(folder: Path) -> Result:
    """Read the files of a run.

    Raises:
        ValueError: If the folder is not a run, or no epoch of it is finished.
    """
    log, settings = folder / "log.txt", folder / "config.yaml"
    if not (log.is_file() and settings.is_file()):
        raise ValueError(f"run is {str(folder)!r}, expected a folder with log.txt and config.yaml")
    run, epochs = config.load(settings), read_log(log)
    last, wanted = epochs[-1], run.optim.epochs
    unfinished = f" ({len(epochs)} of {wanted} epochs)" if len(epochs) < wanted else ""
    plan, task = read_plan(folder), task_of(run.data.data_set)
    primary = task.primary
    try:
        return Result(
            name=folder.resolve().name + unfinished,
            model=run.model.model,
            reduction=_reduction(run.reduction) or _fusion(run.fusion),
            task=task,
            metrics={primary.name: last[primary.key], **log_metrics(last, task)},
            ema=last.get(f"test_ema_{primary.name}"),
            epochs=len(epochs),
            seconds=sum(epoch["train_seconds"] for epoch in epochs),
            speed=median(epoch["images_per_second"] for epoch in epochs),
            memory_mib=max(epoch["peak_memory_mib"] for epoch in epochs),
            memory_kind=last["peak_memory_kind"],
            tokens=last["tokens"][-1] if last["tokens"] else None,
            share=None if plan is None else float(plan["share"]),
            machine=machine(read_environment(folder)),
            recipe={**fingerprint(run), "changed": _changes(epochs)},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{log} is not a log of this program; it has no {error}") from None


def _changes(epochs: Sequence[Mapping[str, Any]]) -> str | None:
    """Settings that were changed in the course of a run, None if none was."""
    changes = [(record["epoch"], record["changed"]) for record in epochs if "changed" in record]
    return "; ".join(changed_settings(*change) for change in changes) or None


def changed_settings(epoch: int, settings: Mapping[str, list[Any]]) -> str:
    """Return a change of settings in words.

    Args:
        epoch: The first one under the settings that are new, from 0.
        settings: Before and now, by name.
    """
    texts = [f"{name} {' -> '.join(map(str, values))}" for name, values in dict(settings).items()]
    return f"{', '.join(texts)} after {epoch} epochs"


def read_primary(folder: Path) -> Metric:
    """Return the metric that decides in a run; that of most data sets if no file names its own.

    Raises:
        ConfigError: If the settings are damaged.
    """
    settings = folder / "config.yaml"
    if not settings.is_file():
        return PRIMARY
    return task_of(config.load(settings).data.data_set).primary


def read_log(log: Path) -> list[dict[str, Any]]:
    """Return the records of a log.txt; a last line that a crash cut short does not count.

    Raises:
        ValueError: If a line is damaged, or there is none.
    """
    epochs = []
    lines = log.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            epochs.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise ValueError(f"{log}: line {number} is not a JSON object") from None
    if not epochs:
        raise ValueError(f"{log} is empty, expected a run with a finished epoch")
    return epochs


def log_metrics(record: Mapping[str, Any], task: Task) -> dict[str, float | None]:
    """Return the metrics of a line of log.txt by name, None where it has none."""
    return {metric.name: record.get(metric.key) for metric in task.metrics}


def read_environment(folder: Path) -> dict[str, Any]:
    """Return a run's env.json, its machine and versions; nothing without such a file.

    Raises:
        ValueError: If the file is damaged.
    """
    return _object(folder / "env.json", "the machine of a run") or {}


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Return which tokens a run removed, None for a model without layers of tokens.

    Raises:
        ValueError: If the file is damaged.
    """
    path, what = folder / "plan.json", "a plan with its share"
    plan = _object(path, what)
    if plan is not None and not isinstance(plan.get("share"), float | int):
        raise ValueError(f"{path} is damaged, expected {what}")
    return plan


def _object(path: Path, what: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged, expected {what}") from None


def compare(results: Sequence[Result], *, mixed: bool = False) -> Table:
    """Return runs as a table, one line each, with differences to the first in brackets.

    Args:
        results: At least one.
        mixed: Whether they may be of several machines or recipes: then without time, memory and
            differences.

    Raises:
        ValueError: If they are without `mixed`; the message names what differs.  Or if they are
            of several tasks.
    """
    task = results[0].task
    if other := next((result for result in results if result.task is not task), None):
        raise ValueError(
            f"{other.name} is measured by {other.primary.title} and {results[0].name} by"
            f" {task.primary.title}, expected runs of one task"
        )
    for what in () if mixed else ("machine", "recipe"):
        if differences := differing(getattr(result, what) for result in results):
            raise ValueError(
                f"runs differ in {described(differences)}, expected one {what}; "
                "--mixed shows them without time, memory and differences"
            )
    if mixed:
        differences = differing([{**result.recipe, **result.machine} for result in results])
        apart = f"not comparable in time and memory: {described(differences)}"
        note = apart if differences else "no differences"
    else:
        kinds = sorted({result.memory_kind for result in results})
        note = f"memory: {'; '.join(kinds)}; in brackets: against {results[0].name}"
    metrics = (*(metric.head for metric in task.metrics), f"EMA {task.primary.unit}".rstrip())
    return Table(
        head=(*_NAMES, *metrics, *(() if mixed else _COST), *_TOKENS),
        rows=[_row(result, None if mixed else results[0]) for result in results],
        names=len(_NAMES),
        notes=[note],
        values=_values(results),
        document=[result.flat() for result in results],
    )


def _values(results: Sequence[Result]) -> list[list[Any]]:
    """Head and plain figures; the machine's entries stand in columns of their own."""
    flat = [result.flat() for result in results]
    names = [name for name in flat[0] if name not in ("machine", "recipe")]
    where = list(dict.fromkeys(name for result in results for name in result.machine))
    rows = [
        [*(known[name] for name in names), *(known["machine"].get(name) for name in where)]
        for known in flat
    ]
    return [[*names, *where], *rows]


def _reduction(chosen: config.Reduction) -> str:
    """Method, schedule and whatever is not the method's own; empty without."""
    if chosen.reduction == "none":
        return ""
    more = (
        chosen.reduction_hook,
        chosen.scan_policy,
        chosen.gap_policy,
        chosen.class_token_policy,
        chosen.reduction_options,
    )
    return ", ".join([chosen.reduction, chosen.reduction_schedule, *filter(None, more)])


def _fusion(fusion: config.Fusion) -> str:
    if fusion.fusion_plan is not None:
        text = f"plan {fusion.fusion_plan}"
    elif fusion.fusion_strategy == "none":
        return "none"
    else:
        layer = "" if fusion.fusion_layer is None else f" {fusion.fusion_layer}"
        text = f"{fusion.fusion_strategy}{layer}, r = {fusion.fusion_token}"
    return text if fusion.fusion_method == "famba-v" else f"{text}, {fusion.fusion_method}"


def _row(result: Result, first: Result | None) -> list[str]:
    """The cells of a run; without a `first` to compare it with, no time and no memory."""
    base = None if result is first else first
    cells = [result.name, result.model, result.reduction]
    for name, value in result.metrics.items():
        cells.append(_with_change(name, value, None if base is None else base.metrics[name], 2))
    cells.append(_with_change(result.primary.name, result.ema, None, 2))
    if first is not None:
        whole = base is not None and result.epochs == base.epochs
        labelled = base is not None and result.memory_kind == base.memory_kind
        for name, same in (("seconds", whole), ("speed", True), ("memory_mib", labelled)):
            known = getattr(base, name) if base and same else None
            cells.append(_with_change(name, getattr(result, name), known or None, 1))
    return [
        *cells,
        "-" if result.tokens is None else str(result.tokens),
        "-" if result.share is None else f"{result.share:.2f}",
    ]


def _with_change(name: str, value: float | None, base: float | None, digits: int) -> str:
    if value is None:
        return "-"
    change = "" if base is None else f" ({difference(name, value, base)})"
    return f"{value:.{digits}f}{change}"
