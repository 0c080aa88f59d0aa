"""Training curves of runs: accuracy, loss and learning rate by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fambav.arguments import instance
from fambav.experiments.metrics import PRIMARY
from fambav.tasks import Metric
from fambav.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]


def curves(runs: Mapping[str, Sequence[Record]], *, title: str, metric: Metric = PRIMARY) -> Figure:
    """Draw the logs of runs into one figure.

    Args:
        runs: Records of their epochs, as log.txt holds them, by the names of the runs.
        title: What they have in common.
        metric: The primary one of their task.

    Raises:
        ValueError: If no record has anything to draw.
    """
    instance("runs", runs, Mapping, "the records of each run by its name")
    panels = _panels(metric)
    keys = [key for key in panels if any(key in record for log in runs.values() for record in log)]
    if not keys:
        raise ValueError(f"logs have none of {', '.join(panels)}, expected those of runs")
    columns = min(3, len(keys))
    figure = style.figure(4 * columns, 3.3 * -(-len(keys) // columns) + 1.2)
    style.headed(figure, title, "epochs count from 1 here, from 0 in log.txt")
    axes = style.grid_of(figure, len(keys), columns)
    for key, panel in zip(keys, axes, strict=True):
        _draw(panel, runs, key, *panels[key])
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


def _draw(
    axes: Axes, runs: Mapping[str, Sequence[Record]], key: str, title: str, label: str
) -> None:
    """Draw one figure of every run that has it."""
    for number, (name, records) in enumerate(runs.items()):
        known = [record for record in records if key in record]
        epochs, values = [r["epoch"] + 1 for r in known], [r[key] for r in known]
        few = max(1, len(known) // 8)  # marks on a long curve
        axes.plot(epochs, values, label=name, markevery=few, **style.line_style(number))
    axes.set(title=title, ylabel=label, xlabel="epoch, from 1")
    style.whole_ticks(axes)
    style.plain(axes, grid="both")
