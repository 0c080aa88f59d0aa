"""The patches of each token drawn on the image: layer by layer, by strategy, animated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from torch import Tensor, nn

from fambav.arguments import refusal, whole
from fambav.models import Backbone
from fambav.viz import patches, style
from fambav.viz.compare import OWN, compare_strategies, described, reducing
from fambav.viz.patches import DROPPED, share, spread
from fambav.viz.trace import (
    Ints,
    Pixels,
    Seen,
    TokenTrace,
    reducing_stages,
    trace_stages,
    trace_tokens,
)

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


class _View(NamedTuple):
    """The tokens of a stage, or of a model that is one, at a depth.

    Attributes:
        trace: Of the stage.
        layer: From 1; 0 for the start.
        at: Labels of the patches there.
        colour: Of each patch.
    """

    trace: TokenTrace
    layer: int
    at: Ints
    colour: Ints

    @property
    def name(self) -> str:
        """Of the layer, 0 for the start."""
        return f"{self.trace.prefix}{self.layer}"

    @property
    def kept(self) -> int:
        """Tokens behind the layer."""
        return self.trace.kept[self.layer]

    def title(self, behind: str) -> str:
        """Say which layer, after `behind`, and how many tokens there are."""
        stage = self.trace.prefix.rstrip(".")
        start = f"start of stage {stage}" if stage else "input"
        return f"{behind if self.layer else start}: {self.kept} tokens"


def groups(
    model: nn.Module,
    image: Seen,
    *,
    title: str | None = None,
    layers: Sequence[int] | None = None,
) -> Figure:
    """Draw the patches of each token, at the start and behind layers.

    Args:
        model: One of ours; it stays as it is.
        image: As the model takes it, (3, height, width), or a trace of it; of a model of stages,
            a trace of each stage.
        title: Model and reduction by default.
        layers: Which layers, from 1 over all stages; if not given, those of the stages that remove
            tokens, or of all if none does, or some spread evenly, 12 panels in all.

    Raises:
        ValueError: If the model is not one of ours, takes no such image, or has no such layer.
    """
    chosen = _chosen(trace_stages(model, image), layers)
    figure, panels = style.panels(
        len(chosen),
        columns=_ROW,
        side=_SIDE,
        title=title_of(model, title),
        detail=_key(chosen),
    )
    for axes, view in zip(panels, chosen, strict=True):
        _draw(axes, view.trace.pixels, view.at, view.colour, outlined=view.layer > 0)
        style.picture(axes, view.title(f"layer {view.name}"))
    return figure


def strategies(model: Backbone, image: Seen, *, title: str | None = None) -> Figure:
    """Draw the tokens under every strategy and the model's own plan; arguments as of `groups`."""
    image = image if isinstance(image, Tensor) else trace_stages(model, image)[0].image
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


def animation(model: nn.Module, image: Seen, *, title: str | None = None) -> list[Figure]:
    """Draw the tokens at the start and behind every layer; arguments as of `groups`.

    Returns:
        depth + 1 figures of one size, which `save` makes a GIF of; so many of each stage that
        removes tokens, or of all if none does.
    """
    views = [
        view for trace in reducing_stages(trace_stages(model, image)) for view in _views(trace)
    ]
    heading = title_of(model, title), _key(views)
    return [_frame(views, number, heading=heading) for number in range(len(views))]


def _views(trace: TokenTrace) -> list[_View]:
    """Return the tokens of a stage at its start and behind each layer."""
    over = patches.depths(trace)
    colour = patches.colours(over)
    return [_View(trace, layer, at, colour) for layer, at in enumerate(over)]


def _chosen(traces: Sequence[TokenTrace], layers: Sequence[int] | None) -> list[_View]:
    """Return what `groups` draws: of each stage its start, and layers."""
    shown = reducing_stages(traces) if layers is None else traces
    starts, behind = list[_View](), list[_View]()
    for trace in shown:
        start, *rest = _views(trace)
        starts.append(start)
        few = spread(len(rest), share(_PANELS, len(shown))) if layers is None else ()
        behind += [rest[layer - 1] for layer in few] if layers is None else rest
    if layers is not None:
        behind = [behind[layer - 1] for layer in known_layers(layers, len(behind))]
    return [
        view
        for start in starts
        if (own := [view for view in behind if view.trace is start.trace])
        for view in (start, *own)
    ]


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


def _key(views: Sequence[_View]) -> str:
    """Return the legend of some panels."""
    joined = any(len(patches.links(view.at)) for view in views)
    gone = any((view.at == DROPPED).any() for view in views)
    return f"{KEY}{LINKED if joined else ''}{GONE if gone else ''}"


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


def _frame(views: Sequence[_View], number: int, *, heading: tuple[str, str]) -> Figure:
    figure, view, kept = style.figure(5.2, 7.4), views[number], [view.kept for view in views]
    style.headed(figure, *heading)
    above, below = figure.subplots(2, 1, height_ratios=(8, 1))
    _draw(above, view.trace.pixels, view.at, view.colour, outlined=view.layer > 0)
    style.picture(above, view.title(f"behind layer {view.name} of {views[-1].name}"))
    bars = below.bar(range(len(kept)), kept, color=style.PALE)
    bars[number].set_color(style.BLUE)
    style.plain(below, grid="y")
    most = max(kept)
    below.set(xlabel="layer", ylabel="tokens", ylim=(0, most), yticks=(0, most))
    step = 1 if len(kept) <= 10 else 4
    below.set_xticks(range(0, len(kept), step), [view.name for view in views[::step]])
    return figure
