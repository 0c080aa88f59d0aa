"""Finished runs side by side, from the files in their folders.

Source of the numbers: log.txt, one JSON object per epoch, config.yaml, plan.json and env.json.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fambav import config
from fambav.comparison.likeness import differing, machine, recipe, told
from fambav.comparison.tables import Table

_NAMES = ("run", "model", "reduction")
_ACCURACY = ("top-1 %", "top-5 %", "EMA %")
_COST = ("train s", "images/s", "memory MiB")
_TOKENS = ("tokens", "token-layers")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to.

    Attributes:
        name: Name of its folder, and how far it came if it is not finished.
        model: Name of the model.
        reduction: How tokens are removed, in short.
        acc1: Top-1 of the raw weights after the last epoch, in percent.
        acc5: The same of the first five guesses, None if the log does not say.
        ema_acc1: Top-1 of the averaged weights, None without.
        epochs: How many of them are finished.
        seconds: Training time over those epochs, without evaluation.
        speed: Images per second, the median epoch's.
        memory_mib: Peak memory of the epochs.
        memory_kind: What that counts.
        tokens: Tokens in the last layer, None if the model has no such thing.
        share: Tokens summed over the layers, as a share of what they are without reduction.
        machine: Where it ran; empty if no file says so.
        recipe: How it was trained, without its reduction, its seed and the places of files.
    """

    name: str
    model: str
    reduction: str
    acc1: float
    acc5: float | None
    ema_acc1: float | None
    epochs: int
    seconds: float
    speed: float
    memory_mib: float
    memory_kind: str
    tokens: int | None
    share: float | None
    machine: dict[str, Any] = field(default_factory=dict, compare=False)
    recipe: dict[str, Any] = field(default_factory=dict, compare=False)


def read(folder: Path) -> Result:
    """Read the files of a run.

    Raises:
        ValueError: If the folder is not a run, or no epoch of it is finished.
    """
    log, settings = folder / "log.txt", folder / "config.yaml"
    if not (log.is_file() and settings.is_file()):
        raise ValueError(f"run is {str(folder)!r}, expected a folder with log.txt and config.yaml")
    run, epochs = config.load(settings), epochs_of(log)
    last, wanted = epochs[-1], run.optim.epochs
    unfinished = f" ({len(epochs)} of {wanted} epochs)" if len(epochs) < wanted else ""
    try:
        return Result(
            name=folder.resolve().name + unfinished,
            model=run.model.model,
            reduction=_reduction(run.reduction) or _fusion(run.fusion),
            acc1=last["test_acc1"],
            acc5=last.get("test_acc5"),
            ema_acc1=last.get("test_ema_acc1"),
            epochs=len(epochs),
            seconds=sum(epoch["train_seconds"] for epoch in epochs),
            speed=median(epoch["images_per_second"] for epoch in epochs),
            memory_mib=max(epoch["peak_memory_mib"] for epoch in epochs),
            memory_kind=last["peak_memory_kind"],
            tokens=last["tokens"][-1] if last["tokens"] else None,
            share=_share(folder / "plan.json"),
            machine=machine(_about(folder / "env.json")),
            recipe=recipe(run),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{log} is not a log of this program; it has no {error}") from None


def refuse_mixed(results: Sequence[Result]) -> None:
    """Refuse runs of several machines or recipes, whose time and memory tell nothing together.

    Raises:
        ValueError: If there are; it names what differs.
    """
    for what, found in (
        ("machine", differing(result.machine for result in results)),
        ("recipe", differing(result.recipe for result in results)),
    ):
        if found:
            raise ValueError(
                f"runs differ in {told(found)}, expected one {what}; "
                "--mixed shows them without time, memory and differences"
            )


def table(results: Sequence[Result], *, form: str = "text", mixed: bool = False) -> str:
    """Return the runs as text; see `tabulated`.

    Args:
        results: At least one.
        form: One of FORMATS.
        mixed: Whether they are of several machines or recipes.

    Raises:
        ValueError: If they are, and `mixed` does not say so.
    """
    found = tabulated(results, mixed=mixed)
    if form == "json":
        return json.dumps([vars(result) for result in results], indent=1)
    return _csv(results) if form == "csv" else found.drawn(form)


def tabulated(results: Sequence[Result], *, mixed: bool = False) -> Table:
    """Return the runs as a table, one line each, with differences to the first in brackets.

    Args:
        results: At least one.
        mixed: Whether they are of several machines or recipes: then without time, memory and
            differences.

    Raises:
        ValueError: If they are, and `mixed` does not say so.
    """
    if not mixed:
        refuse_mixed(results)
    head = (*_NAMES, *_ACCURACY, *(() if mixed else _COST), *_TOKENS)
    rows = [_row(result, None if mixed else results[0]) for result in results]
    notes = [_mixture(results)] if mixed else [_kinds(results)]
    return Table(head=head, rows=rows, names=len(_NAMES), notes=notes)


def _kinds(results: Sequence[Result]) -> str:
    kinds = sorted({result.memory_kind for result in results})
    return f"memory: {'; '.join(kinds)}; in brackets: against {results[0].name}"


def _mixture(results: Sequence[Result]) -> str:
    found = differing([{**result.recipe, **result.machine} for result in results])
    return f"not comparable in time and memory: {told(found)}" if found else "no differences"


def epochs_of(log: Path) -> list[dict[str, Any]]:
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


def _about(path: Path) -> dict[str, Any]:
    """What a run says of its machine; nothing if it has no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged, expected the machine of a run") from None


def _share(path: Path) -> float | None:
    if not path.is_file():
        return None
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["share"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged, expected a plan with its share") from None


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
    cells = [
        result.name,
        result.model,
        result.reduction,
        _points(result.acc1, None if base is None else base.acc1),
        _points(result.acc5, None if base is None else base.acc5),
        _points(result.ema_acc1, None),
    ]
    if first is not None:
        labelled = result.memory_kind == first.memory_kind
        whole = result.epochs == first.epochs
        cells += [
            _compared(result.seconds, base.seconds if base and whole else None),
            _compared(result.speed, None if base is None else base.speed),
            _compared(result.memory_mib, base.memory_mib if base and labelled else None),
        ]
    return [
        *cells,
        "-" if result.tokens is None else str(result.tokens),
        "-" if result.share is None else f"{result.share:.2f}",
    ]


def _points(value: float | None, base: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}{'' if base is None else f' ({value - base:+.2f})'}"


def _compared(value: float, base: float | None) -> str:
    change = "" if not base else f" ({100 * (value / base - 1):+.0f}%)"
    return f"{value:.1f}{change}"


def _csv(results: Sequence[Result]) -> str:
    """One line of plain figures per run; a missing one is empty."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    names = [name for name in vars(results[0]) if name not in ("machine", "recipe")]
    where = list(dict.fromkeys(name for result in results for name in result.machine))
    lines.writerow([*names, *where])
    for result in results:
        own = [getattr(result, name) for name in names]
        lines.writerow(own + [result.machine.get(name) for name in where])
    return text.getvalue().removesuffix("\n")
