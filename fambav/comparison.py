"""Finished runs side by side, from the files in their folders.

Source of the numbers: log.txt, one JSON object per epoch, config.yaml and plan.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fambav import config

Cells = list[str]

_NAMES = ("run", "model", "reduction")
_HEAD = (
    *_NAMES,
    "top-1 %",
    "EMA %",
    "train s",
    "images/s",
    "memory MiB",
    "tokens",
    "token-layers",
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to.

    Attributes:
        name: Name of its folder, and how far it came if it is not finished.
        model: Name of the model.
        reduction: How tokens are removed, in short.
        acc1: Top-1 of the raw weights after the last epoch, in percent.
        ema_acc1: The same of the averaged weights, None without.
        seconds: Training time over all epochs, without evaluation.
        speed: Images per second, the median epoch's.
        memory_mib: Peak memory of the epochs.
        memory_kind: What that counts.
        tokens: Tokens in the last layer, None if the model has no such thing.
        share: Tokens summed over the layers, as a share of what they are without reduction.
    """

    name: str
    model: str
    reduction: str
    acc1: float
    ema_acc1: float | None
    seconds: float
    speed: float
    memory_mib: float
    memory_kind: str
    tokens: int | None
    share: float | None


def read(folder: Path) -> Result:
    """Read the files of a run.

    Raises:
        ValueError: If the folder is not a run, or no epoch of it is finished.
    """
    log, settings = folder / "log.txt", folder / "config.yaml"
    if not (log.is_file() and settings.is_file()):
        raise ValueError(f"run is {str(folder)!r}, expected a folder with log.txt and config.yaml")
    run, epochs = config.load(settings), _epochs(log)
    last, wanted = epochs[-1], run.optim.epochs
    unfinished = f" ({len(epochs)} of {wanted} epochs)" if len(epochs) < wanted else ""
    try:
        return Result(
            name=folder.resolve().name + unfinished,
            model=run.model.model,
            reduction=_reduction(run.reduction) or _fusion(run.fusion),
            acc1=last["test_acc1"],
            ema_acc1=last.get("test_ema_acc1"),
            seconds=sum(epoch["train_seconds"] for epoch in epochs),
            speed=median(epoch["images_per_second"] for epoch in epochs),
            memory_mib=max(epoch["peak_memory_mib"] for epoch in epochs),
            memory_kind=last["peak_memory_kind"],
            tokens=last["tokens"][-1] if last["tokens"] else None,
            share=_share(folder / "plan.json"),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{log} is not a log of this program; it has no {error}") from None


def table(results: Sequence[Result], *, markdown: bool) -> str:
    """Return the runs as a table, one line each, with differences to the first in brackets.

    Args:
        results: At least one.
        markdown: Whether to draw it in Markdown.
    """
    first = results[0]
    rows = [_HEAD, *(_row(result, first) for result in results)]
    kinds = sorted({result.memory_kind for result in results})
    lines = drawn(rows, names=len(_NAMES), markdown=markdown)
    return "\n".join([*lines, "", f"memory: {'; '.join(kinds)}; in brackets: against {first.name}"])


def drawn(rows: Sequence[Sequence[str]], *, names: int, markdown: bool) -> list[str]:
    """Return the lines of a table.

    Args:
        rows: Its cells; the first row is the head.
        names: Columns at the left that are no figures.
        markdown: Whether to draw it in Markdown.
    """
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---" * names + "|---:" * (len(rows[0]) - names) + "|")
        return lines
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_padded(row, widths, names)).rstrip() for row in rows]


def _epochs(log: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a crash cut short does not count."""
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


def _row(result: Result, first: Result) -> Cells:
    same = result is first
    labelled = result.memory_kind == first.memory_kind
    return [
        result.name,
        result.model,
        result.reduction,
        f"{result.acc1:.2f}{'' if same else f' ({result.acc1 - first.acc1:+.2f})'}",
        "-" if result.ema_acc1 is None else f"{result.ema_acc1:.2f}",
        _compared(result.seconds, None if same else first.seconds),
        _compared(result.speed, None if same else first.speed),
        _compared(result.memory_mib, None if same or not labelled else first.memory_mib),
        "-" if result.tokens is None else str(result.tokens),
        "-" if result.share is None else f"{result.share:.2f}",
    ]


def _compared(value: float, base: float | None) -> str:
    change = "" if not base else f" ({100 * (value / base - 1):+.0f}%)"
    return f"{value:.1f}{change}"


def _padded(row: Sequence[str], widths: Sequence[int], names: int) -> Cells:
    pairs = list(zip(row, widths, strict=True))
    left, figures = pairs[:names], pairs[names:]
    return [t.ljust(width) for t, width in left] + [t.rjust(width) for t, width in figures]
