"""The patches of each token drawn on the image: layer by layer, by strategy, animated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, nn

from fambav.arguments import refusal, whole
from fambav.models import Backbone
from fambav.viz import patches, style
from fambav.viz.compare import OWN, compare_strategies, described, reducing
from fambav.viz.patches import DROPPED, spread
from fambav.viz.trace import Ints, Pixels, TokenTrace, trace_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEY = (
    "patches of one colour are one token, or end in one; white lines part tokens; "
    "uncoloured patches are tokens of their own"
)
LINKED = "; lines with dots at their ends join the parts of one token"
GONE = "; crossed patches were dropped"
_ROW, _SIDE = 4, 2.1  # panels in a row, inches of a panel
_PANELS = 12
_STRATEGY_LAYERS = 6


def groups(
    model: nn.Module,
    image: Tensor | TokenTrace,
    *,
    title: str | None = None,
    layers: Sequence[int] | None = None,
) -> Figure:
    """Draw the patches of each token, at the start and behind layers.

    Args:
        model: One of ours; it stays as it is.
        image: As the model takes it, (3, height, width), or a trace of it.
        title: Model and reduction by default.
        layers: Which layers, from 1; all, or 11 of them spread evenly, if not given.

    Raises:
        ValueError: If the model is not one of ours, takes no such image, or has no such layer.
    """
    trace = trace_tokens(model, image)
    over = patches.depths(trace)
    colour = patches.colours(over)
    depth = len(over) - 1
    chosen = (0, *(spread(depth, _PANELS - 1) if layers is None else known_layers(layers, depth)))
    figure, panels = style.panels(
        len(chosen),
        columns=_ROW,
        side=_SIDE,
        title=title_of(model, title),
        detail=_key(over[list(chosen)], linked=True),
    )
    for axes, layer in zip(panels, chosen, strict=True):
        _draw(axes, trace.pixels, over[layer], colour, outlined=layer > 0)
        name = f"layer {layer}" if layer else "input"
        style.picture(axes, f"{name}: {trace.kept[layer]} tokens")
    return figure


def strategies(model: Backbone, image: Tensor | TokenTrace, *, title: str | None = None) -> Figure:
    """Draw the tokens under every strategy and the model's own plan; arguments as of `groups`."""
    image = image.image if isinstance(image, TokenTrace) else image
    method, reductions = compare_strategies(model)
    chosen = spread(model.depth, _STRATEGY_LAYERS)
    figure = style.figure(1.5 * len(chosen) + 2.2, 1.75 * len(reductions) + 1.2, pad=0.025)
    panels = figure.subplots(len(reductions), len(chosen), squeeze=False)
    gone = False
    for number, (label, reduction) in enumerate(reductions.items()):
        row = panels[number]
        with reducing(model, reduction):
            trace = trace_tokens(model, image)
        over = patches.depths(trace)
        gone = gone or bool((over == DROPPED).any())
        colour, kept = patches.colours(over), trace.kept
        for axes, layer in zip(row, chosen, strict=True):
            fewer = kept[layer] < trace.start
            _draw(axes, trace.pixels, over[layer], colour, outlined=fewer, linked=False)
            above = "" if number else f"layer {layer}: "
            style.picture(axes, f"{above}{kept[layer]}")
        row[0].set_ylabel(f"{label}\n{100 * trace.share:.0f}%", rotation=0, labelpad=8)
        row[0].yaxis.label.set(ha="right", va="center")
        row[0].yaxis.label.set_fontweight("bold" if OWN in label else "normal")
    title = title or f"{_name(model)} with each strategy of {method}"
    shares = "numbers: tokens behind a layer; percentages: tokens kept, of all token-layers"
    rows = f"r: tokens fused at a layer; L: last layer that fuses (lower), or first; bold: {OWN}"
    style.headed(figure, title, f"{shares}; {rows}; {KEY}{GONE if gone else ''}")
    return figure


def animation(
    model: nn.Module, image: Tensor | TokenTrace, *, title: str | None = None
) -> list[Figure]:
    """Draw the tokens at the start and behind every layer; arguments as of `groups`.

    Returns:
        depth + 1 figures of one size, which `save` makes a GIF of.
    """
    trace = trace_tokens(model, image)
    over = patches.depths(trace)
    colour = patches.colours(over)
    heading = title_of(model, title), _key(over, linked=True)
    return [_frame(trace, over[n], colour, layer=n, heading=heading) for n in range(len(over))]


def known_layers(layers: Sequence[int], depth: int, *, first: int = 1) -> list[int]:
    """Return layers to draw.

    Raises:
        ValueError: If one is not from `first` to `depth`.
    """
    if not isinstance(layers, Sequence) or not layers:
        raise refusal("layers", layers, f"a list of some of {first} to {depth}")
    return [whole("layers", layer, least=first, most=depth) for layer in layers]


def title_of(model: nn.Module, title: str | None) -> str:
    """Return the title, by default model and reduction."""
    if title is not None:
        return title
    return f"{_name(model)}, {described(cast(Backbone, model).reduction)}"


def _name(model: nn.Module) -> str:
    return str(cast(Any, model).pretrained_cfg.get("architecture", type(model).__name__))


def _key(over: Ints, *, linked: bool) -> str:
    """Return the legend of some panels with these labels, (panels, height, width)."""
    joined = linked and any(len(patches.links(at)) for at in over)
    return f"{KEY}{LINKED if joined else ''}{GONE if (over == DROPPED).any() else ''}"


def _draw(
    axes: Axes,
    image: Pixels,
    at: Ints,
    colour: Ints,
    *,
    outlined: bool = True,
    linked: bool = True,
) -> None:
    """Draw an image with its tokens: their borders, and lines between parts that do not touch."""
    from matplotlib.collections import LineCollection

    rows, columns = at.shape
    large = patches.painted(patches.fitted(image, at.shape), at, colour)
    axes.imshow(large, extent=(0, columns, rows, 0), interpolation="nearest")
    thick = 1.0 if columns <= 10 else 0.7
    links = patches.links(at) if linked else np.empty((0, 2, 2))
    edges = patches.borders(at) if outlined else np.empty((0, 2, 2))
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
    trace: TokenTrace, at: Ints, colour: Ints, *, layer: int, heading: tuple[str, str]
) -> Figure:
    figure, kept = style.figure(5.2, 7.4), trace.kept
    name = f"behind layer {layer} of {len(kept) - 1}" if layer else "input"
    style.headed(figure, *heading)
    above, below = figure.subplots(2, 1, height_ratios=(8, 1))
    _draw(above, trace.pixels, at, colour, outlined=layer > 0)
    style.picture(above, f"{name}: {kept[layer]} tokens")
    bars = below.bar(range(len(kept)), kept, color=style.PALE)
    bars[layer].set_color(style.BLUE)
    style.plain(below, grid="y")
    below.set(xlabel="layer", ylabel="tokens", ylim=(0, kept[0]), yticks=(0, kept[0]))
    below.set_xticks(range(0, len(kept), 1 if len(kept) <= 10 else 4))
    return figure
