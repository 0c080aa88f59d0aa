"""The metrics that tables show."""

from __future__ import annotations

from fambav.tasks import Metric, task_of

METRICS = task_of("DIGITS").metrics
PRIMARY = METRICS[0]
__all__ = ["METRICS", "PRIMARY", "Metric", "difference"]


def difference(name: str, value: float, base: float, digits: int = 2) -> str:
    """Return how a figure differs from another: a metric in its unit, anything else in percent."""
    if any(metric.name == name for metric in METRICS):
        return f"{value - base:+.{digits}f}"
    return f"{100 * (value / base - 1):+.0f}%"
