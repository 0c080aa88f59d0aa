"""Training curves of runs: accuracy, loss and learning rate by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fambav.experiments.metrics import PRIMARY
from fambav.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

_METRIC = f"{PRIMARY.title} ({PRIMARY.unit})"
PANELS = {  # key of a log: title, label of the axis
    f"test_{PRIMARY.name}": (f"held-out {PRIMARY.title}", _METRIC),
    f"test_ema_{PRIMARY.name}": (f"held-out {PRIMARY.label}, EMA weights", _METRIC),
    "train_loss": ("training loss", "loss"),
    "test_loss": ("held-out loss", "loss"),
    "train_lr": ("mean learning rate", "learning rate"),
}


def curves(runs: Mapping[str, Sequence[Record]], *, title: str) -> Figure:
    """Draw the logs of runs into one figure.

    Args:
        runs: Records of their epochs, as log.txt holds them, by the names of the runs.
        title: What they have in common.

    Raises:
        ValueError: If no record has anything to draw.
    """
    keys = [key for key in PANELS if any(key in record for log in runs.values() for record in log)]
    if not keys:
        raise ValueError(f"logs have none of {', '.join(PANELS)}, expected those of runs")
    columns = min(3, len(keys))
    figure = style.figure(4 * columns, 3.3 * -(-len(keys) // columns) + 1.2)
    style.headed(figure, title, "epochs count from 1 here, from 0 in log.txt")
    axes = style.grid_of(figure, len(keys), columns)
    for key, panel in zip(keys, axes, strict=True):
        _draw(panel, runs, key)
    style.legend(figure, style.labelled(axes[0]))
    return figure


def _draw(axes: Axes, runs: Mapping[str, Sequence[Record]], key: str) -> None:
    """Draw one figure of every run that has it."""
    for number, (name, records) in enumerate(runs.items()):
        known = [record for record in records if key in record]
        epochs, values = [r["epoch"] + 1 for r in known], [r[key] for r in known]
        few = max(1, len(known) // 8)  # marks on a long curve
        axes.plot(epochs, values, label=name, markevery=few, **style.line_style(number))
    title, label = PANELS[key]
    axes.set(title=title, ylabel=label, xlabel="epoch, from 1")
    style.whole_ticks(axes)
    style.plain(axes, grid="both")
