"""Training curves of runs: accuracy, loss and learning rate by epoch, accuracy by time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fambav.arguments import instance
from fambav.experiments.metrics import PRIMARY
from fambav.tasks import Metric
from fambav.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Lines = Mapping[str, Sequence[tuple[float, float]]]  # places and values of each run


_SECONDS, _EPOCH = "train_seconds", "epoch, from 1"


def curves(
    runs: Mapping[str, Sequence[Record]],
    *,
    title: str,
    metric: Metric = PRIMARY,
    timed: bool = True,
) -> Figure:
    """Draw the logs of runs into one figure.

    Args:
        runs: Records of their epochs, as log.txt holds them, by the names of the runs.
        title: What they have in common.
        metric: The primary one of their task.
        timed: Whether their seconds of training compare, as those of one machine do: the metric is
            drawn against them too.

    Raises:
        ValueError: If no record has anything to draw.
    """
    instance("runs", runs, Mapping, "the records of each run by its name")
    panels = _panels(metric)
    keys = [key for key in panels if any(key in record for log in runs.values() for record in log)]
    if not keys:
        raise ValueError(f"logs have none of {', '.join(panels)}, expected those of runs")
    drawn = [(*panels[key], _EPOCH, _lines(runs, key, _by_epoch)) for key in keys]
    if timed and metric.key in keys and all(_SECONDS in r for log in runs.values() for r in log):
        name, label = panels[metric.key]
        lines = _lines(runs, metric.key, _by_time)
        drawn.append((f"{name} by time", label, "minutes of training", lines))
    columns = min(3, len(drawn))
    figure = style.figure(4 * columns, 3.3 * -(-len(drawn) // columns) + 1.2)
    style.headed(figure, title, "epochs count from 1 here, from 0 in log.txt")
    axes = style.grid_of(figure, len(drawn), columns)
    for panel, (name, label, along, lines) in zip(axes, drawn, strict=True):
        _draw(panel, lines)
        panel.set(title=name, ylabel=label, xlabel=along)
        if along == _EPOCH:
            style.whole_ticks(panel)
        style.plain(panel, grid="both")
    style.legend(figure, style.labelled(axes[0]))
    return figure


def _panels(metric: Metric) -> dict[str, tuple[str, str]]:
    """Title and label of the axis for each key of a log that is drawn."""
    label = f"{metric.title} ({metric.unit})" if metric.unit else metric.title
    return {
        metric.key: (f"held-out {metric.title}", label),
        f"test_ema_{metric.name}": (f"held-out {metric.label}, EMA weights", label),
        "train_loss": ("training loss", "loss"),
        "test_loss": ("held-out loss", "loss"),
        "train_lr": ("mean learning rate", "learning rate"),
    }


def _by_epoch(records: Sequence[Record]) -> list[float]:
    return [record["epoch"] + 1 for record in records]


def _by_time(records: Sequence[Record]) -> list[float]:
    """Return the minutes of training up to the end of each epoch, without evaluation."""
    return [seconds / 60 for seconds in accumulate(record[_SECONDS] for record in records)]


def _lines(
    runs: Mapping[str, Sequence[Record]], key: str, along: Callable[..., list[float]]
) -> Lines:
    """Return the places and values of every run's records that have `key`."""
    return {
        name: [(at, r[key]) for at, r in zip(along(log), log, strict=True) if key in r]
        for name, log in runs.items()
    }


def _draw(axes: Axes, lines: Lines) -> None:
    for number, (name, points) in enumerate(lines.items()):
        few = max(1, len(points) // 8)  # marks on a long curve
        places, values = [place for place, _ in points], [value for _, value in points]
        axes.plot(places, values, label=name, markevery=few, **style.line_style(number))
