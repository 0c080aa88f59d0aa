"""Tokens and operations at each layer, as bars beside what they are without reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fambav.pictures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Work(NamedTuple):
    """Operations of each layer for one image, in one convention.

    Attributes:
        own: Of the layer itself.
        added: Of choosing and taking away tokens, and of scanning across gaps.
        dense: Of the layer with all tokens.
        counted: What counts as one, in words.
    """

    own: Sequence[int]
    added: Sequence[int]
    dense: Sequence[int]
    counted: str


def bars(lengths: Sequence[int], start: int, work: Work, *, title: str) -> Figure:
    """Draw what each layer works on and how much it computes.

    Args:
        lengths: Tokens that each layer's mixer sees.
        start: Tokens before the first layer, class tokens included.
        work: Operations of each layer.
        title: Model and method.
    """
    figure = style.figure(8, 5.6)
    share = 100 * sum(lengths) / (start * len(lengths))
    spent, dense = sum(work.own) + sum(work.added), sum(work.dense)
    left = f"{share:.0f}% of the token-layers and {100 * spent / dense:.0f}% of the operations"
    detail = f"left: {left}; operations: {work.counted}"
    style.headed(figure, title, detail)
    above, below = figure.subplots(2, 1, sharex=True)
    unit, size = ("GFLOPs", 1e9) if max(work.dense) >= 1e9 else ("MFLOPs", 1e6)
    _bars(above, [(lengths, style.BLUE, "left")], [start] * len(lengths), decimals=0)
    own, added = (np.array(part) / size for part in (work.own, work.added))
    parts = [(own, style.BLUE, "layer"), (added, style.ORANGE, "reduction")]
    _bars(below, parts if added.any() else parts[:1], np.array(work.dense) / size, decimals=1)
    above.set_ylabel("tokens")
    below.set(ylabel=unit, xlabel="layer")
    below.set_xticks([n for n in range(1, len(lengths) + 1) if len(lengths) <= 12 or n % 4 == 0])
    for axes in (above, below):
        style.plain(axes)
    style.legend(figure, style.labelled(below))
    return figure


def _bars(
    axes: Axes,
    parts: Sequence[tuple[Any, str, str]],
    dense: Any,
    *,
    decimals: int,
) -> None:
    """Stack parts in front of what there is without reduction, and write the sums."""
    places = np.arange(1, len(dense) + 1)
    axes.bar(places, dense, color=style.PALE, width=0.86, label="without reduction")
    top = np.zeros(len(dense))
    for values, colour, name in parts:
        axes.bar(places, values, bottom=top, color=colour, width=0.62, label=name)
        top = top + np.array(values)
    size = style.type_size(style.of(axes))
    if len(dense) <= 12:
        for place, value in enumerate(top.tolist(), start=1):
            axes.text(
                place, value, f"{value:.{decimals}f}", ha="center", va="bottom", fontsize=size
            )
    axes.set_ylim(0, 1.15 * max(*dense, *top))
