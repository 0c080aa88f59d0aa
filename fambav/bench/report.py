"""What was measured, as a table to read and as JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fambav.engine.run_dir import environment

Row = Mapping[str, Any]


class MeasureError(RuntimeError):
    """Something cannot be measured here, or is worse than it may be."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one benchmark found.

    Attributes:
        title: What was done.
        settings: On what, where, when and with which versions.
        rows: A mapping for each candidate, all with the same keys; None where there is no value.
        skipped: What could not run here, with the reason.
        tables: Further tables by their titles, each made like `rows`.
    """

    title: str
    settings: dict[str, Any]
    rows: Sequence[Row]
    skipped: dict[str, str] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)

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
        lines = [f"{self.title}: {told}", "", *table(self.rows)]
        for title, rows in self.tables.items():
            lines += ["", title, "", *table(rows)]
        lines += [f"{name} is absent: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def settings(
    device: torch.device, dtype: torch.dtype | None = None, **sizes: Any
) -> dict[str, Any]:
    """Return `sizes`, and where, when and with which versions something was measured."""
    about = environment()
    return {
        **sizes,
        **({} if dtype is None else {"dtype": dtype_name(dtype)}),
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


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without torch's."""
    return str(dtype).removeprefix("torch.")


def training_dtype(device: torch.device) -> torch.dtype:
    """Return what a run computes in on this device, if nothing else is said."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def positive(**numbers: int) -> None:
    """Refuse a number below 1.

    Raises:
        ValueError: If there is one.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


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


def table(rows: Sequence[Row]) -> list[str]:
    """Lay rows out below the names of their columns; return the lines."""
    if not rows:
        return []
    lines = [[name.replace("_", " ") for name in rows[0]]]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    place = ["<" if isinstance(value, str) else ">" for value in rows[0].values()]
    return [
        "  ".join(f"{c:{p}{w}}" for c, p, w in zip(cells, place, widths, strict=True)).rstrip()
        for cells in lines
    ]


def _json(rows: Sequence[Row]) -> str:
    return "[\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]"
