"""What runs came to, epoch by epoch: accuracy, loss and learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fambav.pictures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

_ACCURACY = "top-1 accuracy (%)"
PANELS = {  # key of a log: title, label of the axis
    "test_acc1": ("held-out", _ACCURACY),
    "test_ema_acc1": ("held-out, moving average", _ACCURACY),
    "train_loss": ("training", "loss"),
    "test_loss": ("held-out", "loss"),
    "train_lr": ("training, epoch's mean", "learning rate"),
}


def curves(runs: Mapping[str, Sequence[Record]], *, title: str) -> Figure:
    """Draw the logs of runs into one picture.

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
    rows = -(-len(keys) // columns)
    figure = style.figure(4 * columns, 3.3 * rows + 1.0)
    style.headed(figure, title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for key, panel in zip(keys, axes, strict=False):
        _draw(panel, runs, key)
    for unused in axes[len(keys) :]:
        unused.remove()
    style.legend(figure, style.labelled(axes[0]))
    return figure


def _draw(axes: Axes, runs: Mapping[str, Sequence[Record]], key: str) -> None:
    """Draw one figure of every run that has it; epochs count from 1."""
    for number, (name, records) in enumerate(runs.items()):
        known = [record for record in records if key in record]
        epochs, values = [r["epoch"] + 1 for r in known], [r[key] for r in known]
        few = max(1, len(known) // 8)  # marks on a long curve
        look = style.line_style(number)
        axes.plot(epochs, values, label=name, markevery=few, markersize=5, **look)
    title, label = PANELS[key]
    axes.set(title=title, ylabel=label, xlabel="epoch")
    style.whole_ticks(axes)
    style.plain(axes, grid="both")
