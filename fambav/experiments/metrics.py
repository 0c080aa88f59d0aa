"""The metrics of held-out images that tables show: the one file that knows them by name."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """A metric of a run.

    Attributes:
        name: log.txt has it as `test_NAME`, results have it as `NAME`.
        label: What a column of it is called.
        unit: Of its figures.
        title: What an axis of it is called.
        higher_is_better: Which of two figures wins.
    """

    name: str
    label: str
    unit: str
    title: str
    higher_is_better: bool

    @property
    def head(self) -> str:
        """Label and unit."""
        return f"{self.label} {self.unit}"


METRICS = (
    Metric("acc1", "top-1", "%", "top-1 accuracy", higher_is_better=True),
    Metric("acc5", "top-5", "%", "top-5 accuracy", higher_is_better=True),
)
PRIMARY = METRICS[0]  # by which runs are compared
