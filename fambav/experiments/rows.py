"""The rows of a grid's file: their names, their settings, and the figures that a paper reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fambav.config import ConfigError, check_path, format_value, refuse
from fambav.config.setting import Option, from_data
from fambav.experiments.metrics import all_metrics
from fambav.registry import nearest

OWN = ("seed", "output_dir", "resume", "finetune", "eval")  # settings that the grid itself sets
NONE = "-"  # an empty part of a name

COSTS = ("seconds", "memory")  # of what a paper reports; the file has seconds as `time`
_CLOCK = re.compile(r"(\d{1,5}):([0-5]\d):([0-5]\d)")
_FIGURE = Option("of a paper", kind=float)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: What the file calls it; of several labels, those that are not NONE.
        slug: The same as the name of a folder.
        labels: What stands in the columns of names.
        settings: What differs from the row without reduction, by the names of settings.
        file: The YAML file that it is read from instead of the grid's base.
        paper: What a paper reports of it, metrics by name, and COSTS, which are seconds of
            training and peak memory in the paper's own unit; None without any.
    """

    name: str
    slug: str
    labels: tuple[str, ...]
    settings: dict[str, Any]
    file: Path | None = None
    paper: dict[str, float] | None = None


def read_rows(path: Path, given: Any, *, names: int, taken: Sequence[str]) -> list[Row]:
    """Return the rows that a file lists.

    Args:
        path: The file.
        given: Its entry `rows`.
        names: How many columns name a row.
        taken: Names that a row may not have.

    Raises:
        ConfigError: If that is no list of rows.
    """
    if not isinstance(given, list) or not given:
        refuse(f"{path}: rows", given, "a list of rows, each with a name and settings")
    slugs = {name: name for name in taken}
    rows = []
    for number, entry in enumerate(given, start=1):
        row = _row(path, f"{path}: row {number}", entry, names)
        if row.slug in slugs:
            hint = f"it is too near to {slugs[row.slug]!r}"
            wanted = f"a name that no other row has; {hint}"
            refuse(f"{path}: row {number}: name", row.name, wanted)
        slugs[row.slug] = row.name
        rows.append(row)
    return rows


def read_settings(label: str, given: Any) -> dict[str, Any]:
    """Return settings as they were written, under keys that may stand there.

    Raises:
        ConfigError: If they are none, or one is the grid's own.
    """
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        refuse(label, given, "settings such as {lr: 0.001}")
    for key in given:
        if key in OWN:
            raise ConfigError(f"{label} sets {key}, which the grid sets itself")
    return dict(given)


def _row(path: Path, label: str, entry: Any, names: int) -> Row:
    labels = _labels(entry.get("name")) if isinstance(entry, dict) else None
    if labels is None:
        refuse(label, entry, "settings and a `name`, which is a text")
    if len(labels) != names:
        refuse(f"{label}: name", list(labels), f"{names} of them, as `names` has")
    name = ", ".join(text for text in labels if text != NONE)
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    if not slug:
        refuse(f"{label}: name", name, "a name with a letter or a digit")
    label = f"{path}: row {name!r}"
    file = entry.get("config")
    if file is not None:
        if not isinstance(file, str):
            refuse(f"{label}: config", file, "the path of a YAML file")
        check_path(f"{label}: config", file)
    given = {key: value for key, value in entry.items() if key not in ("name", "config", "paper")}
    return Row(
        name=name,
        slug=slug,
        labels=labels,
        settings=read_settings(label, given),
        file=None if file is None else path.parent / file,
        paper=_paper(f"{label}: paper", entry.get("paper")),
    )


def _labels(given: Any) -> tuple[str, ...] | None:
    """The parts of a name, one for each column; None if they are no names."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and given and all(type(part) in (str, int) for part in given):
        return tuple(map(str, given))
    return None


def _paper(label: str, given: Any) -> dict[str, float] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or not given:
        example = f"{{{next(iter(all_metrics()))}: 70.5, time: '4:08:40'}}"
        refuse(label, given, f"figures such as {example}")
    known = (*all_metrics(), "time", "memory")
    figures = dict[str, float]()
    for key, value in given.items():
        if key not in known:
            raise ConfigError(
                f"{label}: {format_value(key)} is no figure; {nearest(str(key), known)}"
            )
        if key == "time":
            figures["seconds"] = _seconds(f"{label}: time", value)
        else:
            figures[key] = from_data(_FIGURE, value, f"{label}: {key}")
    return figures


def _seconds(label: str, given: Any) -> float:
    """Seconds of `h:mm:ss`."""
    match = _CLOCK.fullmatch(given) if isinstance(given, str) else None
    if match is None:
        refuse(label, given, "hours, minutes and seconds in quotes such as '4:08:40'")
    hours, minutes, seconds = map(int, match.groups())
    return 3600.0 * hours + 60 * minutes + seconds
