"""Results of a benchmark, as a text table and as JSON."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fambav.engine.run_dir import environment
from fambav.table import Table, cell, json_document

Row = Mapping[str, Any]


class MeasureError(RuntimeError):
    """Something cannot be measured here, or fails a limit."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of one benchmark.

    Attributes:
        title: Of the benchmark.
        settings: Its sizes, the device, the date and versions.
        rows: A mapping for each candidate, all with the same keys; None for no value.
        skipped: Candidates that could not run here, with the reason.
        tables: Further tables by their titles, each like `rows`.
    """

    title: str
    settings: dict[str, Any]
    rows: Sequence[Row]
    skipped: dict[str, str] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    def json(self) -> str:
        """Return everything as JSON, with a line for each row."""
        head = asdict(self)
        rows, tables = head.pop("rows"), head.pop("tables")
        return json_document(head, **({"tables": tables} if tables else {}), rows=rows)

    def text(self) -> str:
        """Return tables to read."""
        about = ", ".join(f"{n.replace('_', ' ')} {cell(v)}" for n, v in self.settings.items())
        lines = [f"{self.title}: {about}"]
        shown = {title: rows for title, rows in {"": self.rows, **self.tables}.items() if rows}
        for title, rows in shown.items():
            lines += [*(["", title] if title else []), "", Table.of_records(rows).render("text")]
        lines += [f"{name} is absent: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def settings(
    device: torch.device, dtype: torch.dtype | None = None, **sizes: Any
) -> dict[str, Any]:
    """Return `sizes`, the device, the date and the versions of a measurement."""
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
    """Return the name of a GPU, or the architecture of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def training_dtype(device: torch.device) -> torch.dtype:
    """Return the default dtype of training on this device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def positive(**numbers: int) -> None:
    """Check that all numbers are at least 1.

    Raises:
        ValueError: If one is not.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
