"""What each token stands for, drawn on the image: over depth, for several strategies, in motion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fambav.pictures import groups, style
from fambav.pictures.groups import DROPPED, Pixels
from fambav.pictures.walk import Ints, Walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEY = (
    "patches of one colour are one token, or end in one; white lines part tokens; "
    "uncoloured patches are tokens of their own"
)
GONE = "; crossed patches were dropped"
_ROW, _SIDE = 4, 2.1  # panels in a row, inches of a panel
_PANELS = 12


def over_depth(
    image: Pixels, walk: Walk, *, title: str, layers: Sequence[int] | None = None
) -> Figure:
    """Draw the tokens at the start and behind layers.

    Args:
        image: What the model sees, pixels from 0 to 1, (height, width, 3).
        walk: Its way.
        title: Model, method and image.
        layers: Which layers, from 1; all, or 11 of them spread evenly, if not given.
    """
    over = groups.depths(walk)
    colour, left = groups.colours(over), walk.left
    chosen = (0, *(spread(len(over) - 1, _PANELS - 1) if layers is None else layers))
    figure, panels = style.panels(
        len(chosen),
        columns=_ROW,
        side=_SIDE,
        title=title,
        detail=KEY + (GONE if (over == DROPPED).any() else ""),
    )
    for axes, layer in zip(panels, chosen, strict=True):
        draw(axes, image, over[layer], colour, outlined=layer > 0)
        style.empty(axes)
        name = f"layer {layer}" if layer else "input"
        style.name(axes, f"{name}: {left[layer]} tokens")
    return figure


def strategies(image: Pixels, walks: Mapping[str, Walk], *, title: str) -> Figure:
    """Draw the tokens of several strategies, one below the other, at the same layers.

    Args:
        image: What the model sees, pixels from 0 to 1, (height, width, 3).
        walks: Its way under each strategy, by name; equally many layers.
        title: Model, method and image.
    """
    depth = len(next(iter(walks.values())).steps)
    chosen = spread(depth, 6)
    figure = style.figure(1.5 * len(chosen) + 1.5, 1.75 * len(walks) + 1.2, pad=0.025)
    overs = {name: groups.depths(walk) for name, walk in walks.items()}
    gone = any((over == DROPPED).any() for over in overs.values())
    shares = "numbers: tokens behind a layer; percentages: token-layers left"
    style.headed(figure, title, f"{shares}; {KEY}{GONE if gone else ''}")
    panels = figure.subplots(len(walks), len(chosen), squeeze=False)
    for number, (name, walk) in enumerate(walks.items()):
        colour, left = groups.colours(overs[name]), walk.left
        for axes, layer in zip(panels[number], chosen, strict=True):
            fewer = left[layer] < walk.start
            draw(axes, image, overs[name][layer], colour, outlined=fewer, linked=False)
            style.plain(axes, grid="")
            style.empty(axes)
            style.name(axes, f"layer {layer}: {left[layer]}" if number == 0 else f"{left[layer]}")
        share = sum(len(step.features) for step in walk.steps) / (walk.start * depth)
        first = panels[number, 0]
        first.set_ylabel(f"{name}\n{100 * share:.0f}%", rotation=0, labelpad=8)
        first.yaxis.label.set(ha="right", va="center")
    return figure


def frames(image: Pixels, walk: Walk, *, title: str) -> list[NDArray[np.uint8]]:
    """Draw the tokens at the start and behind every layer, one picture after the other.

    Args:
        image: What the model sees, pixels from 0 to 1, (height, width, 3).
        walk: Its way.
        title: Model, method and image.

    Returns:
        depth + 1 pictures of one size, each (height, width, 3).
    """
    over = groups.depths(walk)
    colour, left = groups.colours(over), walk.left
    return [
        _frame(image, over[layer], colour, title=title, layer=layer, left=left)
        for layer in range(len(over))
    ]


def draw(
    axes: Axes,
    image: Pixels,
    at: Ints,
    colour: Ints,
    *,
    outlined: bool = True,
    linked: bool = True,
) -> None:
    """Draw an image with its tokens.

    Args:
        axes: Where; its units become patches.
        image: Pixels from 0 to 1, (height, width, 3).
        at: Labels of the patches, (grid height, grid width).
        colour: Their colours, as `groups.colours` gives them.
        outlined: Draw the borders of tokens.
        linked: Join the parts of a token whose patches do not all touch with lines.
    """
    from matplotlib.collections import LineCollection

    rows, columns = at.shape
    large = groups.painted(groups.fitted(image, at.shape), at, colour)
    axes.imshow(large, extent=(0, columns, rows, 0), interpolation="nearest")
    thick = 1.0 if columns <= 10 else 0.7
    links = groups.links(at) if linked else np.empty((0, 2, 2))
    edges = groups.borders(at) if outlined else np.empty((0, 2, 2))
    for lines, wide in ((links, 0.8 * thick), (edges, thick)):
        for color, times in ((style.INK, 2.2), ("white", 1.0)):  # seen on light and on dark
            axes.add_collection(LineCollection(list(lines), colors=color, lw=times * wide))
    x, y = links.reshape(-1, 2).T
    axes.scatter(x, y, s=5 * thick, color="white", edgecolors=style.INK, lw=0.4, zorder=3)
    gone = np.argwhere(at == DROPPED)
    crosses = [
        ((x + 0.3, y + start), (x + 0.7, y + 1 - start)) for y, x in gone for start in (0.3, 0.7)
    ]
    axes.add_collection(LineCollection(crosses, colors="#9a9a9a", linewidths=0.75 * thick))
    axes.set(xlim=(-0.06, columns + 0.06), ylim=(rows + 0.06, -0.06))


def _frame(
    image: Pixels, at: Ints, colour: Ints, *, title: str, layer: int, left: Sequence[int]
) -> NDArray[np.uint8]:
    figure = style.figure(5.2, 6.3)
    name = f"behind layer {layer} of {len(left) - 1}" if layer else "input"
    style.headed(figure, title)
    above, below = figure.subplots(2, 1, height_ratios=(8, 1))
    draw(above, image, at, colour, outlined=layer > 0)
    style.plain(above, grid="")
    style.empty(above)
    style.name(above, f"{name}: {left[layer]} tokens")
    bars = below.bar(range(len(left)), left, color=style.PALE)
    bars[layer].set_color(style.BLUE)
    style.plain(below)
    below.set(xlabel="layer", ylabel="tokens", ylim=(0, left[0]), yticks=(0, left[0]))
    below.set_xticks(_ticks(len(left)))
    return rendered(figure)


def rendered(figure: Figure) -> NDArray[np.uint8]:
    """Return a picture as pixels, (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pixels


def _ticks(count: int) -> list[int]:
    step = 1 if count <= 10 else 4
    return list(range(0, count, step))


def spread(depth: int, most: int) -> list[int]:
    """Return all layers from 1, or `most` of them spread evenly, the last one among them."""
    chosen = min(depth, most)
    places: Any = np.linspace(depth / chosen, depth, chosen).round()
    return [int(layer) for layer in places]
