"""How alike the tokens are that the mixer of each layer reads: the cosines between them.

neighbours    mean over tokens that follow one another in the sequence
all pairs     mean over all pairs of two tokens

What fusion feeds on: the more alike tokens are, the less goes when they become their mean.
Source: Shen et al., "Famba-V", arXiv:2409.09808, section 3, compares tokens by the same cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fambav.pictures import style
from fambav.pictures.tokens import spread
from fambav.pictures.walk import Floats, Walk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW, _MOST = 4, 12


class Likeness(NamedTuple):
    """Mean cosines at each layer; not a number where there is only one token.

    Attributes:
        neighbours: Of tokens that follow one another in the sequence, (depth,).
        pairs: Of all pairs of two tokens, (depth,).
    """

    neighbours: Floats
    pairs: Floats


def cosines(features: Floats) -> Floats:
    """Return the cosine of every two tokens, (length, length), of features, (length, dim)."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    each = np.divide(features, norm, out=np.zeros_like(features), where=norm > 0)
    found: Floats = each @ each.T
    return found


def likeness(walk: Walk) -> Likeness:
    """Return the mean cosines of the tokens that each mixer reads."""
    near, every = [], []
    for step in walk.steps:
        found = cosines(step.features)
        above = found[np.triu_indices(len(found), 1)]
        near.append(np.diagonal(found, 1).mean() if above.size else np.nan)
        every.append(above.mean() if above.size else np.nan)
    return Likeness(np.array(near, dtype=np.float32), np.array(every, dtype=np.float32))


def maps(walk: Walk, *, title: str) -> Figure:
    """Draw the cosine of every two tokens at each layer, or at 12 spread evenly.

    Args:
        walk: The way of an image.
        title: Model, method and image.
    """
    layers = spread(len(walk.steps), _MOST)
    found = {layer: cosines(walk.steps[layer - 1].features) for layer in layers}
    figure, panels = style.panels(
        len(layers),
        columns=_ROW,
        side=2.2,
        title=title,
        detail="cosine of every two tokens that a layer's mixer reads, in their sequence",
        lines=2,
        more=(1.1, 0.3),
    )
    least = min(0.0, *(float(each.min()) for each in found.values()))
    for axes, (layer, each) in zip(panels, found.items(), strict=True):
        drawn = axes.imshow(each, vmin=least, vmax=1, cmap=style.MAP, interpolation="nearest")
        style.name(axes, f"layer {layer}")
        axes.set(xticks=[0, len(each) - 1], yticks=[])  # the same up and down
        axes.set_xticklabels(["1", f"{len(each)}"])
    figure.supxlabel("token", fontsize=style.type_size(figure))
    figure.supylabel("token", fontsize=style.type_size(figure))
    bar = figure.colorbar(drawn, ax=panels, shrink=0.9, aspect=30)
    bar.set_label("cosine", fontsize=style.type_size(figure))
    bar.ax.tick_params(labelsize=style.type_size(figure))
    return figure


def curves(found: Mapping[str, Likeness], *, title: str) -> Figure:
    """Draw the mean cosines over depth, of one or several models or strategies.

    Args:
        found: Likeness by name.
        title: What they are of.
    """
    figure = style.figure(8, 4.6)
    style.headed(figure, title, "mean cosine of the tokens that a layer's mixer reads")
    panels = figure.subplots(1, 2, sharey=True)
    names = ("neighbours in the sequence", "all pairs")
    for axes, name, part in zip(panels, names, Likeness._fields, strict=True):
        for number, (label, each) in enumerate(found.items()):
            values = getattr(each, part)
            look = style.line_style(number)
            axes.plot(range(1, len(values) + 1), values, label=label, markersize=5, **look)
        axes.set(title=name, xlabel="layer")
        style.whole_ticks(axes)
        style.plain(axes, grid="both")
    panels[0].set_ylabel("mean cosine")
    style.plain(panels[0], grid="both")
    style.legend(figure, style.labelled(panels[0]))
    return figure
