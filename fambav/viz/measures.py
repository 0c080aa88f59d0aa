"""What each layer reads and computes: cosines of tokens, the scan's path, tokens and operations.

neighbours    mean cosine over tokens that follow one another in the sequence
all pairs     mean cosine over all pairs of two tokens

The more similar tokens are, the less their mean loses.
Source: Shen et al., "Famba-V", arXiv:2409.09808, section 3, compares tokens by the same cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fambav import flops
from fambav.models import Backbone, Hierarchical
from fambav.reduction import make_any_reduction
from fambav.registry import FAMILIES
from fambav.viz import patches, style
from fambav.viz.compare import described, reducing
from fambav.viz.figures import known_layers, title_of
from fambav.viz.patches import share, spread
from fambav.viz.trace import Floats, Ints, Seen, TokenTrace, reducing_stages, trace_stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAPS, _MAP_ROW = 12, 4
_PATHS, _PATH_ROW = 9, 3
_CONVENTION = "all-directions"  # of counting operations

Reduced = Backbone | Hierarchical  # a model whose tokens can be reduced


def similarity(model: nn.Module, image: Seen, *, title: str | None = None) -> Figure:
    """Draw the cosine of every two tokens that a mixer reads; arguments as of `groups`.

    It is drawn at each layer, or at 12 spread evenly; of a model of stages, in those that remove
    tokens, or in all if none does.
    """
    shown = reducing_stages(trace_stages(model, image))
    maps = {
        trace.names[layer - 1]: cosines(trace.steps[layer - 1].features)
        for trace in shown
        for layer in spread(len(trace.steps), max(1, _MAPS // len(shown)))
    }
    figure, panels = style.panels(
        len(maps),
        columns=_MAP_ROW,
        side=2.2,
        title=title_of(model, title),
        detail="cosine of every two tokens that a layer's mixer reads, in their sequence",
        lines=2,
        more=(1.1, 0.3),
    )
    least = min(0.0, *(float(each.min()) for each in maps.values()))
    for axes, (layer, each) in zip(panels, maps.items(), strict=True):
        drawn = axes.imshow(each, vmin=least, vmax=1, cmap="cividis", interpolation="nearest")
        ticks = [0, len(each) - 1]
        axes.set(xticks=ticks, xticklabels=["1", f"{len(each)}"], yticks=[], title=f"layer {layer}")
        style.plain(axes)  # the same up and down
    size = style.type_size(figure)
    figure.supxlabel("token", fontsize=size)
    figure.supylabel("token", fontsize=size)
    bar = figure.colorbar(drawn, ax=panels, shrink=0.9, aspect=30)
    bar.set_label("cosine", fontsize=size)
    bar.ax.tick_params(labelsize=size)
    return figure


def mean_similarity(model: Reduced, image: Seen, *, title: str | None = None) -> Figure:
    """Draw mean cosines over depth, also without reduction; arguments as of `groups`."""
    traces = trace_stages(model, image)
    runs = {described(model.reduction): _depth_means(traces)}
    if model.reduction.schedule.removed:
        with reducing(model, make_any_reduction(model.info)):
            whole = trace_stages(model, traces[0].image)
        runs["no reduction, same weights"] = _depth_means(whole)
    figure = style.figure(8, 4.6)
    detail = "mean cosine of the tokens that a layer's mixer reads"
    style.headed(figure, title_of(model, title), detail)
    panels = figure.subplots(1, 2, sharey=True)
    for part, name in enumerate(("neighbours in the sequence", "all pairs")):
        axes = panels[part]
        for number, (label, means) in enumerate(runs.items()):
            layers = range(1, len(means[part]) + 1)
            axes.plot(layers, means[part], label=label, **style.line_style(number))
        axes.set(title=name, xlabel="layer")
        _name_layers(axes, model)
    panels[0].set_ylabel("mean cosine")
    for axes in panels:
        style.plain(axes, grid="both")
    style.legend(figure, style.labelled(panels[0]))
    return figure


def _depth_means(traces: Sequence[TokenTrace]) -> tuple[Floats, Floats]:
    """Return the mean cosines of all layers, over all stages."""
    near, every = zip(*map(mean_cosines, traces), strict=True)
    return np.concatenate(near), np.concatenate(every)


def _name_layers(axes: Axes, model: Reduced) -> None:
    """Put ticks along x at layers, which are at 1, 2, ..., by their names."""
    names = model.reduction.schedule.names
    if isinstance(model, Hierarchical):
        axes.set_xticks(range(1, len(names) + 1), names, rotation=90 if len(names) > 8 else 0)
    else:
        style.whole_ticks(axes)


def cosines(features: Floats) -> Floats:
    """Return the cosine of every two tokens, (length, length), of features, (length, dim)."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    each = np.divide(features, norm, out=np.zeros_like(features), where=norm > 0)
    cosine: Floats = each @ each.T
    return cosine


def mean_cosines(trace: TokenTrace) -> tuple[Floats, Floats]:
    """Return the mean cosines of neighbours and of all pairs that each mixer reads, each (depth,).

    A layer with one token has NaN.
    """
    near, every = [], []
    for step in trace.steps:
        cosine = cosines(step.features)
        above = cosine[np.triu_indices(len(cosine), 1)]
        near.append(np.diagonal(cosine, 1).mean() if above.size else np.nan)
        every.append(above.mean() if above.size else np.nan)
    return np.array(near, dtype=np.float32), np.array(every, dtype=np.float32)


class ScanPath(NamedTuple):
    """A scan of patches, without class tokens.

    A step is in order if it leads to a token that stood later in the scan of the whole image.

    Attributes:
        patches: Grid index, row by row, of the tokens that are scanned, in their order, (kept,).
        forward: Whether each step is in order, (kept - 1,).
    """

    patches: Ints
    forward: NDArray[np.bool_]

    @property
    def share(self) -> float:
        """Share of the steps that are in order, 0 to 1; 1 without steps."""
        return float(self.forward.mean()) if self.forward.size else 1.0


def scan_path(trace: TokenTrace, layer: int) -> ScanPath:
    """Return the path of the first direction's scan at a layer, from 1; 0: of the whole image."""
    index = trace.rank.argsort()
    if layer:
        step = trace.steps[layer - 1]
        row_by_row = np.full(trace.start, -1)
        row_by_row[np.delete(np.arange(trace.start), trace.cls_index)] = np.arange(len(index))
        index = row_by_row[step.position[step.order]]
        index = index[index >= 0]
    return ScanPath(index, np.diff(trace.rank[index]) > 0)


def scan(
    model: nn.Module,
    image: Seen,
    *,
    title: str | None = None,
    layers: Sequence[int] | None = None,
) -> Figure:
    """Draw the path of the first direction's scan over the patches that are kept.

    Arguments are as of `groups`, with layer 0 for the whole image; by default that one and layers
    whose mixer reads fewer tokens than the one before, or 9 of them spread evenly; of a model of
    stages those of each stage that removes tokens, or of all if none does.

    Raises:
        ValueError: As `groups`, or if the model does not scan.
    """
    if isinstance(model, Hierarchical) and not FAMILIES[model.family].scan:
        raise ValueError(f"model is a {type(model).__name__}, expected one that scans sequences")
    traces = trace_stages(model, image)
    chosen = _scanned(traces, layers)
    figure, panels = style.panels(
        len(chosen),
        columns=_PATH_ROW,
        side=2.7,
        title=title_of(model, title),
        detail="path of the first direction's scan, from the large dot on",
        lines=2,
        more=(0.0, 0.35),
    )
    for axes, (trace, layer) in zip(panels, chosen, strict=True):
        path = scan_path(trace, layer)
        _draw_path(axes, trace, path)
        whole = f"whole stage {trace.prefix.rstrip('.')}" if trace.prefix else "whole image"
        name = f"layer {trace.names[layer - 1]}" if layer else whole
        tokens = f"{len(path.patches)} patch tokens"
        style.picture(axes, f"{name}: {tokens}\n{100 * path.share:.0f}% of steps in order")
    lines = (("in the order of the whole image", style.BLUE), ("back: order lost", style.RED))
    style.key(figure, [(text, {"color": colour}) for text, colour in lines])
    return figure


def layers(model: Reduced, *, title: str | None = None) -> Figure:
    """Draw how many tokens each layer works on, and how much it computes for one image.

    Raises:
        ValueError: If nothing is known of what the model, or its method of reduction, costs.
    """
    rows = [row for row in flops.count(model).rows if row.layer is not None]
    with reducing(model, make_any_reduction(model.info)):
        unreduced = [row for row in flops.count(model).rows if row.layer is not None]
    full = np.array([row.own.all_directions for row in unreduced])
    own = np.array([row.own.all_directions for row in rows])
    added = np.array([r.alignment.all_directions + r.reduction.all_directions for r in rows])
    schedule, start = model.reduction.schedule, np.array([row.tokens for row in unreduced])
    tokens = np.array(schedule.lengths)
    figure = style.figure(8, 5.6)
    kept, spent = schedule.share, (own + added).sum() / full.sum()
    detail = (
        f"tokens kept: {100 * kept:.0f}% of token-layers; operations: {100 * spent:.0f}% of those "
        f"without reduction, counted as {flops.CONVENTIONS[_CONVENTION]}"
    )
    style.headed(figure, title_of(model, title), detail)
    above, below = figure.subplots(2, 1, sharex=True)
    unit, size = ("GFLOPs", 1e9) if full.max() >= 1e9 else ("MFLOPs", 1e6)
    _bars(above, [(tokens, style.BLUE, "kept")], start, decimals=0)
    parts = [(own / size, style.BLUE, "layer"), (added / size, style.ORANGE, "reduction")]
    _bars(below, parts if added.any() else parts[:1], full / size, decimals=1)
    above.set_ylabel("tokens")
    below.set(ylabel=unit, xlabel="layer")
    few = [n for n in range(1, len(tokens) + 1) if len(tokens) <= 12 or n % 4 == 0]
    below.set_xticks(few, [schedule.names[n - 1] for n in few])
    for axes in (above, below):
        style.plain(axes, grid="y")
    style.legend(figure, style.labelled(below))
    return figure


def _scanned(
    traces: Sequence[TokenTrace], layers: Sequence[int] | None
) -> list[tuple[TokenTrace, int]]:
    """Return the stages and layers whose path is drawn."""
    if layers is None:
        shown = reducing_stages(traces)
        most = share(_PATHS, len(shown))
        return [(trace, layer) for trace in shown for layer in _shorter(trace, most)]
    every = [(traces[0], 0)]
    every += [(trace, n) for trace in traces for n in range(1, len(trace.steps) + 1)]
    return [every[layer] for layer in known_layers(layers, len(every) - 1, first=0)]


def _shorter(trace: TokenTrace, most: int) -> list[int]:
    lengths = [trace.start, *(len(step.position) for step in trace.steps)]
    shorter = [n for n in range(1, len(lengths)) if lengths[n] < lengths[n - 1]]
    chosen = spread(len(shorter), most) if shorter else []
    return [0, *(shorter[n - 1] for n in chosen)]


def _draw_path(axes: Axes, trace: TokenTrace, path: ScanPath) -> None:
    from matplotlib.collections import LineCollection

    height, width = trace.grid
    faint = 0.75 + 0.25 * patches.fitted(trace.pixels, trace.grid)
    axes.imshow(faint, extent=(0, width, height, 0), interpolation="nearest")
    points = np.stack((path.patches % width, path.patches // width), axis=1) + 0.5
    steps = np.stack((points[:-1], points[1:]), axis=1)
    thick = 1.4 if width <= 10 else 0.9
    for forward, colour in ((False, style.RED), (True, style.BLUE)):
        lines = steps[path.forward == forward]
        axes.add_collection(LineCollection(list(lines), colors=colour, linewidths=thick))
    for some, dot in ((points, 7), (points[:1], 34)):
        axes.scatter(some[:, 0], some[:, 1], s=dot * thick, color=style.INK, zorder=3)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _bars(
    axes: Axes, parts: Sequence[tuple[Any, str, str]], full: NDArray[Any], *, decimals: int
) -> None:
    """Stack parts in front of what there is without reduction, and write the sums."""
    x = np.arange(1, len(full) + 1)
    axes.bar(x, full, color=style.PALE, width=0.86, label="without reduction")
    top = np.zeros(len(full))
    for values, colour, name in parts:
        axes.bar(x, values, bottom=top, color=colour, width=0.62, label=name)
        top = top + values
    size = style.type_size(style.figure_of(axes))
    for layer, value in enumerate(top.tolist() if len(full) <= 12 else (), start=1):
        text = f"{value:.{decimals}f}"
        axes.text(layer, value, text, ha="center", va="bottom", fontsize=size)
    axes.set_ylim(0, 1.15 * max(*full, *top))
