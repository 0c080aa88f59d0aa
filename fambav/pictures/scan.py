"""The path of a scan over the patches that are left, and where it turns back.

A step is in order if it leads to a token that stood later in the scan of the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fambav.pictures import groups, style
from fambav.pictures.groups import Pixels
from fambav.pictures.tokens import spread
from fambav.pictures.walk import Ints, Walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW, _SIDE, _MOST = 3, 2.7, 9


class Path(NamedTuple):
    """A scan of patches; class tokens are left out.

    Attributes:
        places: Where the tokens that are scanned stand on the whole grid, row by row, (left,).
        forward: Whether each step is in order, (left - 1,).
    """

    places: Ints
    forward: NDArray[np.bool_]

    @property
    def share(self) -> float:
        """Share of the steps that are in order, 0 to 1; 1 without steps."""
        return float(self.forward.mean()) if self.forward.size else 1.0


def path(walk: Walk, layer: int) -> Path:
    """Return the path of the first direction's scan.

    Args:
        walk: The way of an image.
        layer: From 1; 0 for the scan of the whole image.
    """
    if layer == 0:
        places = walk.rank.argsort()
    else:
        step = walk.steps[layer - 1]
        patches = np.delete(np.arange(walk.start), list(walk.class_places))
        place = np.full(walk.start, -1)
        place[patches] = np.arange(len(patches))
        places = place[step.position[step.order]]
        places = places[places >= 0]
    return Path(places, np.diff(walk.rank[places]) > 0)


def paths(image: Pixels, walk: Walk, *, title: str, layers: Sequence[int] | None = None) -> Figure:
    """Draw the path of the first direction's scan at layers.

    Args:
        image: What the model sees, pixels from 0 to 1, (height, width, 3).
        walk: Its way.
        title: Model, method and image.
        layers: Which layers, 0 for the whole image; if not given, that one and those whose mixer
            reads fewer tokens than the one before, or 9 of them spread evenly.
    """
    chosen = _shorter(walk) if layers is None else list(layers)
    figure, panels = style.panels(
        len(chosen),
        columns=_ROW,
        side=_SIDE,
        title=title,
        detail="path of the first direction's scan, from the large dot on",
        lines=2,
        more=(0.0, 0.35),
    )
    for axes, layer in zip(panels, chosen, strict=True):
        found = path(walk, layer)
        _draw(axes, image, walk.grid, found)
        name = f"layer {layer}" if layer else "whole image"
        tokens = f"{len(found.places)} patch tokens"
        style.name(axes, f"{name}: {tokens}\n{100 * found.share:.0f}% of steps in order")
    _explain(figure)
    return figure


def _shorter(walk: Walk) -> list[int]:
    lengths = [walk.start, *(len(step.position) for step in walk.steps)]
    found = [n for n in range(1, len(lengths)) if lengths[n] < lengths[n - 1]]
    chosen = spread(len(found), _MOST - 1) if found else []
    return [0, *(found[n - 1] for n in chosen)]


def _draw(axes: Axes, image: Pixels, grid: tuple[int, int], found: Path) -> None:
    from matplotlib.collections import LineCollection

    height, width = grid
    faint = 0.75 + 0.25 * groups.fitted(image, grid)
    axes.imshow(faint, extent=(0, width, height, 0), interpolation="nearest")
    points = np.stack((found.places % width, found.places // width), axis=1) + 0.5
    steps = np.stack((points[:-1], points[1:]), axis=1)
    thick = 1.4 if width <= 10 else 0.9
    for forward, colour in ((False, style.RED), (True, style.BLUE)):
        lines = steps[found.forward == forward]
        axes.add_collection(LineCollection(list(lines), colors=colour, linewidths=thick))
    axes.scatter(points[:, 0], points[:, 1], s=7 * thick, color=style.INK, zorder=3)
    axes.scatter(points[0, 0], points[0, 1], s=34 * thick, color=style.INK, zorder=3)
    style.empty(axes)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _explain(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=style.BLUE, label="in the order of the whole image"),
        Line2D([], [], color=style.RED, label="back: order lost"),
    ]
    style.legend(figure, lines)
