"""Metrics of tables: those of a task, or of all tasks where a name may be of any."""

from __future__ import annotations

from fambav.registry import DATA_SETS
from fambav.tasks import Metric, task_of

PRIMARY: Metric = task_of(next(iter(DATA_SETS))).primary  # where no task is named


def all_metrics() -> dict[str, Metric]:
    """Return the metrics of all tasks by name."""
    return {metric.name: metric for name in DATA_SETS for metric in task_of(name).metrics}


def difference(name: str, value: float, base: float, digits: int = 2) -> str:
    """Return how a figure differs from another: a metric in its unit, anything else in percent."""
    if name in all_metrics():
        return f"{value - base:+.{digits}f}"
    return f"{100 * (value / base - 1):+.0f}%"
