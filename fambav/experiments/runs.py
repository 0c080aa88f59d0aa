"""Finished runs: the files in their folders, and the table of several.

Source of the numbers: log.txt, one JSON object per epoch, config.yaml, plan.json and env.json.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from fambav import config
from fambav.arguments import near_path
from fambav.experiments.metrics import PRIMARY, difference
from fambav.experiments.provenance import described, differing, fingerprint, machine
from fambav.json_files import check, parse_object, read_object
from fambav.table import Table
from fambav.tasks import Metric, Task, task_of

LOG = "log.txt"
_NAMES = ("run", "model", "reduction")
_COST = ("train s", "images/s", "memory MiB")
_TOKENS = ("tokens", "token-layers")
_RECORD = {
    "epoch": int,
    "tokens": [int],
    "train_lr": float,
    "train_loss": float,
    "train_seconds": float,
    "images_per_second": float,
    "peak_memory_mib": float,
    "peak_memory_kind": str,
}
_LOW = {"epoch": 0, "train_seconds": 1e-3, "images_per_second": 1e-2}  # as they are rounded
_PLAN = {"share": float, "start": int, "counts": [int], "lengths": [int], "after": bool}


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
        curve: After each of them the training time so far and the primary metric.
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
    curve: tuple[tuple[float, float], ...] = ()

    def seconds_to(self, value: float) -> float | None:
        """Return the training time after which the primary metric is at least as good as `value`.

        None if it never is; the time of the epoch that reaches it counts whole.
        """
        sign = 1 if self.primary.higher_is_better else -1
        return next((at for at, own in self.curve if sign * own >= sign * value), None)

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
            elif name not in ("task", "curve"):
                flat[f"ema_{self.primary.name}" if name == "ema" else name] = value
        return flat


def read_run(folder: Path) -> Result:
    """Read the files of a run.

    Raises:
        ValueError: If the folder is not a run, or no epoch of it is finished.
    """
    log, settings = folder / LOG, folder / "config.yaml"
    if not (log.is_file() and settings.is_file()):
        hint = near_path(folder)
        raise ValueError(
            f"run is {str(folder)!r}, expected a folder with log.txt and config.yaml{hint}"
        )
    run = config.load(settings)
    task, plan = task_of(run.data.data_set), read_plan(folder)
    primary = task.primary
    wanted = {*_RECORD, primary.key} - {"train_lr", "train_loss"}
    epochs = read_log(log, wanted=wanted)
    last, planned = epochs[-1], run.optim.epochs
    unfinished = f" ({len(epochs)} of {planned} epochs)" if len(epochs) < planned else ""
    return Result(
        name=folder.resolve().name + unfinished,
        model=run.model.model,
        reduction=_reduction(run.reduction) or _fusion(run.fusion),
        task=task,
        metrics={primary.name: last[primary.key], **log_metrics(last, task)},
        ema=last.get(f"test_ema_{primary.name}"),
        epochs=len(epochs),
        seconds=sum(epoch["train_seconds"] for epoch in epochs),
        curve=tuple(
            zip(
                accumulate(epoch["train_seconds"] for epoch in epochs),
                (epoch[primary.key] for epoch in epochs),
                strict=True,
            )
        ),
        speed=median(epoch["images_per_second"] for epoch in epochs),
        memory_mib=max(epoch["peak_memory_mib"] for epoch in epochs),
        memory_kind=last["peak_memory_kind"],
        tokens=last["tokens"][-1] if last["tokens"] else None,
        share=None if plan is None else float(plan["share"]),
        machine=machine(read_environment(folder)),
        recipe={**fingerprint(run), "changed": _changes(epochs)},
    )


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


def read_log(log: Path, *, wanted: Collection[str] = ("epoch",)) -> list[dict[str, Any]]:
    """Return the records of a log.txt; a last line that a crash cut short does not count.

    Args:
        log: The file.
        wanted: Keys that each record must have.

    Raises:
        ValueError: If a line is damaged, or there is none.
    """
    epochs = []
    raw = log.read_bytes()
    lines = raw.splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{log}: line {number}"
        try:
            record = parse_object(line, where, "the record of an epoch", constants=True)
        except ValueError:
            if number < len(lines) or raw.endswith(b"\n"):
                raise
            continue
        _check_record(record, where, wanted)
        epochs.append(record)
    if not epochs:
        raise ValueError(f"{log} is empty, expected a run with a finished epoch")
    return epochs


def _check_record(record: Mapping[str, Any], where: str, wanted: Collection[str]) -> None:
    """Refuse a record that lacks a key, or has a figure that is no finite number.

    The loss of training is NaN where every update of an epoch was skipped.
    """
    metrics = [name for name in (*wanted, *record) if name.startswith("test_")]
    form = dict.fromkeys(metrics, float) | {
        name: own for name, own in _RECORD.items() if name in record or name in wanted
    }
    if "changed" in record:
        form["changed"] = {str: list}
    check(record, form, where)
    for name, own in form.items():
        value, low = record[name], _LOW.get(name, -math.inf)
        if own is float and name != "train_loss" and not math.isfinite(value):
            raise ValueError(f"{where}: {name} is {value}, expected a finite number")
        if own in (int, float) and value < low:
            raise ValueError(f"{where}: {name} is {value}, expected at least {low:g}")


def log_metrics(record: Mapping[str, Any], task: Task) -> dict[str, float | None]:
    """Return the metrics of a line of log.txt by name, None where it has none."""
    return {metric.name: record.get(metric.key) for metric in task.metrics}


def read_environment(folder: Path) -> dict[str, Any]:
    """Return a run's env.json, its machine and versions; nothing without such a file.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / "env.json"
    return read_object(path, "the machine of a run") if path.is_file() else {}


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Return which tokens a run removed, None for a model without layers of tokens.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / "plan.json"
    if not path.is_file():
        return None
    plan = read_object(path, "a plan with its share", _PLAN)
    if not 0 <= plan["share"] <= 1:
        raise ValueError(f"{path}: share is {plan['share']}, expected 0 to 1")
    if len(plan["counts"]) != len(plan["lengths"]):
        layers = f"{len(plan['lengths'])}, one for each layer"
        raise ValueError(f"{path}: counts are {len(plan['counts'])} numbers, expected {layers}")
    return plan


def compare(
    results: Sequence[Result], *, mixed: bool = False, reach: Sequence[float] = ()
) -> Table:
    """Return runs as a table, one line each, with differences to the first in brackets.

    Args:
        results: At least one.
        reach: Values of the primary metric; a column for each has the seconds of training to it.
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
    to = [f"s to {f'{value:g} {task.primary.unit}'.rstrip()}" for value in reach]
    times = [[result.seconds_to(value) for value in reach] for result in results]
    head, *values = _values(results)
    return Table(
        head=(*_NAMES, *metrics, *(() if mixed else _COST), *_TOKENS, *to),
        rows=[
            [
                *_row(result, None if mixed else results[0]),
                *("-" if seconds is None else f"{seconds:.1f}" for seconds in own),
            ]
            for result, own in zip(results, times, strict=True)
        ],
        names=len(_NAMES),
        notes=[note],
        values=[[*head, *to], *([*v, *own] for v, own in zip(values, times, strict=True))],
        document=[
            {**result.flat(), **dict(zip(to, own, strict=True))}
            for result, own in zip(results, times, strict=True)
        ],
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
    for metric in result.task.metrics:
        name, known = metric.name, None if base is None else base.metrics[metric.name]
        cells.append(_with_change(name, result.metrics[name], known, metric.digits))
    cells.append(_with_change(result.primary.name, result.ema, None, result.primary.digits))
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
    change = "" if base is None else f" ({difference(name, value, base, digits)})"
    return f"{value:.{digits}f}{change}"
