"""What a report says of runs: their files, read and put into tables.

Source of the numbers: log.txt, config.yaml, plan.json and env.json of each run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fambav import config
from fambav.config import OPTIONS
from fambav.experiments import PRIMARY, Result, read_environment, read_plan
from fambav.report.page import Picture, Section
from fambav.table import Table

_UNKNOWN = "unknown"


def section(name: str, folder: Path, result: Result, pictures: Sequence[Picture]) -> Section:
    """Describe a run.

    Args:
        name: What to call the run.
        folder: Of the run.
        result: What it came to.
        pictures: Its pictures.

    Raises:
        ValueError: If one of its files is damaged.
    """
    settings = folder / "config.yaml"
    return Section(
        name=name,
        summary=_summary(result),
        pictures=pictures,
        plan=_plan(read_plan(folder)),
        changed=_changed(config.load(settings).flat()),
        settings=settings.read_text(encoding="utf-8"),
        environment=_environment(read_environment(folder)),
    )


def _summary(result: Result) -> str:
    share = "" if result.share is None else f", {100 * result.share:.1f}% of the token-layers"
    return (
        f"{result.model}, reduction: {result.reduction}{share}; "
        f"{PRIMARY.label} {result.metrics[PRIMARY.name]:.2f}{PRIMARY.unit} after "
        f"{result.seconds:.1f} s of training, {result.memory_mib:.1f} MiB {result.memory_kind}."
    )


def _plan(plan: Mapping[str, Any] | None) -> Table | None:
    if plan is None:
        return None
    after = plan["after"]
    rows = [
        [
            str(layer),
            str(seen if after else seen + count),
            str(count) if count else "-",
            str(seen),
        ]
        for layer, (count, seen) in enumerate(
            zip(plan["counts"], plan["lengths"], strict=True), start=1
        )
    ]
    point = "after" if after else "before"
    return Table(
        head=("layer", "tokens in", "removed", "tokens its mixer sees"),
        rows=rows,
        names=1,
        notes=[f"tokens go {point} the mixer of their layer"],
    )


def _changed(flat: Mapping[str, Any]) -> Table:
    rows = [
        [name, _text(value), _text(OPTIONS[name].default)]
        for name, value in flat.items()
        if value != OPTIONS[name].default
    ]
    return Table(head=("setting", "value", "default"), rows=rows, names=3)


def _environment(found: Mapping[str, Any]) -> Table:
    return Table(head=("what", "value"), rows=[list(pair) for pair in _pairs(found)], names=2)


def _pairs(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)
