"""The confusion matrix: what the samples of each class are taken for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fambav.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW, _NAMED = 20, 200  # most classes with names at both sides and numbers, and with names at one
_CELL = 0.48  # inches of a cell with a number
_LINE = 0.2  # inches of a row with a name alone
_WIDTH, _MATRIX = 8.4, 6.0  # inches
_LONGEST = 20  # letters of a name
_DETAIL = "shares of the samples of each true class, in percent; colours by square root"


def confusion(counts: Any, names: Sequence[str], *, title: str) -> Figure:
    """Draw a confusion matrix, each row divided by its sum.

    Up to 20 classes have names at both sides and percentages in the cells, up to 200 names and
    numbers at the left and numbers above and below, more have numbers only.

    Args:
        counts: How often each class was predicted for each true one, (true, predicted), integers.
        names: Of the classes, in order.
        title: What was evaluated on what.
    """
    counts = np.asarray(counts)
    classes, totals = len(counts), counts.sum(axis=1)
    shares = np.full(counts.shape, np.nan)  # of a class without samples
    np.divide(100.0 * counts, totals[:, None], out=shares, where=totals[:, None] > 0)
    names = [style.literal(_shortened(name)) for name in names]
    few, named = classes <= _FEW, classes <= _NAMED
    figure = style.figure(*_size(classes))
    style.headed(figure, title, _DETAIL)
    axes = figure.subplots()
    drawn = _draw(axes, shares, square=few or not named)
    if named:
        numbers = [""] * classes if few else [f"{number} " for number in range(classes)]
        rows = zip(numbers, names, totals, strict=True)
        axes.set_yticks(range(classes), [f"{n}{name} ({total})" for n, name, total in rows])
    if few:
        axes.set_xticks(range(classes), names, rotation=90)
        _write_shares(axes, shares)
    else:
        axes.tick_params(top=True, labeltop=True)
    axes.set(xlabel="predicted class", ylabel="true class (samples)" if named else "true class")
    style.plain(axes)
    shrink, size = min(1, 5 / figure.get_figheight()), style.type_size(figure)
    bar = figure.colorbar(drawn, ax=axes, ticks=[0, 5, 20, 50, 100], shrink=shrink, aspect=25)
    bar.set_label("%", fontsize=size)
    bar.ax.tick_params(labelsize=size)
    return figure


def _size(classes: int) -> tuple[float, float]:
    """Return width and height of a figure, in inches."""
    if classes <= _FEW:
        return max(_WIDTH, _CELL * classes + 3.4), _CELL * classes + 2.6
    return _WIDTH, 1.4 + (_LINE * classes if classes <= _NAMED else _MATRIX)


def _draw(axes: Axes, shares: NDArray[np.float64], *, square: bool) -> Any:
    """Draw the cells, on a scale that follows the square root and so separates small shares."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    return axes.imshow(
        shares,
        norm=PowerNorm(0.5, vmin=0, vmax=100),
        cmap=colormaps["cividis"].with_extremes(bad=style.PALE),
        aspect="equal" if square else "auto",
        interpolation="nearest" if len(shares) <= _NAMED else "auto",
    )


def _write_shares(axes: Axes, shares: NDArray[np.float64]) -> None:
    """Write each share that is not 0 into its cell, in a colour that is seen there."""
    size = style.type_size(style.figure_of(axes))
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            text = f"{share:.0f}" if share >= 0.5 else "<1"
            colour = style.INK if share > 30 else "white"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
