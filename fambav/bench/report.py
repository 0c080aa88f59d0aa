"""What was measured, as a table to read and as JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fambav.engine.record import environment

Row = Mapping[str, Any]


class MeasureError(RuntimeError):
    """Something cannot be measured here, or what was checked is wrong."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one benchmark found.

    Attributes:
        title: What was done.
        settings: On what, where, when and with which versions.
        rows: A mapping for each candidate, all with the same keys; None where there is no value.
        skipped: What could not run here, with the reason.
        failures: What was found wrong, a sentence each.
        tables: Further tables by their titles, each made like `rows`.
    """

    title: str
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    failures: tuple[str, ...] = ()
    tables: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)

    def find(self, **wanted: Any) -> Row:
        """Return the first row with these values.

        Raises:
            StopIteration: If there is none.
        """
        return next(row for row in self.rows if wanted.items() <= dict(row).items())

    def json(self) -> str:
        """Return everything as JSON, with a line for each row."""
        told = asdict(self)
        rows, tables = told.pop("rows"), told.pop("tables")
        more = ",\n".join(f"  {json.dumps(title)}: {_json(own)}" for title, own in tables.items())
        made = f' "tables": {{\n{more}\n }},\n' if tables else ""
        return f'{json.dumps(told, indent=1)[:-2]},\n{made} "rows": {_json(rows)}\n}}'

    def text(self) -> str:
        """Return tables to read."""
        told = ", ".join(f"{n.replace('_', ' ')} {_cell(v)}" for n, v in self.settings.items())
        lines = [f"{self.title}: {told}", "", *_lines(self.rows)]
        for title, rows in self.tables.items():
            lines += ["", title, "", *_lines(rows)]
        lines += [f"{name} is absent: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, *(f"wrong: {failure}" for failure in self.failures)])

    def refuse(self) -> None:
        """Refuse what was found wrong.

        Raises:
            MeasureError: If there are failures.
        """
        if self.failures:
            more = f"; and {len(self.failures) - 1} more" if len(self.failures) > 1 else ""
            raise MeasureError(self.failures[0] + more)


def settings(
    device: torch.device, dtype: torch.dtype | None = None, **sizes: Any
) -> dict[str, Any]:
    """Return `sizes`, and where, when and with which versions something was measured."""
    about = environment()
    name = {} if dtype is None else {"dtype": short(dtype)}
    return {
        **sizes,
        **name,
        "device": device_name(device),
        "threads": about["threads"],
        "torch": torch.__version__,
        "triton": about["packages"].get("triton", "none"),
        "date": time.strftime("%Y-%m-%d"),
        "commit": about["commit"] or "unknown",
    }


def device_name(device: torch.device) -> str:
    """Return what the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without torch's."""
    return str(dtype).removeprefix("torch.")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return f"{len(value)} values"
    if isinstance(value, tuple | list):
        return " .. ".join(map(_cell, value))
    return str(value)


def _lines(rows: Sequence[Row]) -> list[str]:
    """Lay rows out below the names of their columns."""
    if not rows:
        return []
    table = [[name.replace("_", " ") for name in rows[0]]]
    table += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    words = [isinstance(value, str) for value in rows[0].values()]
    return [_line(row, widths, words) for row in table]


def _json(rows: Sequence[Row]) -> str:
    return "[\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]"


def _line(cells: list[str], widths: list[int], words: list[bool]) -> str:
    each = zip(cells, widths, words, strict=True)
    return "  ".join(c.ljust(w) if word else c.rjust(w) for c, w, word in each).rstrip()
