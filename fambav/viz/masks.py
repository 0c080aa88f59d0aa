"""An image with its mask, and what a model makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fambav.data.palette import Labels, colours, overlay, palette_image
from fambav.data.types import IGNORE
from fambav.viz import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDE = 3.2  # inches of a panel
_LARGEST = 1024  # pixels of a side that is drawn


def masks(
    image: Image.Image,
    truth: Labels | None,
    prediction: Labels,
    names: Sequence[str],
    *,
    title: str,
) -> Figure:
    """Draw an image, its mask, the predicted mask, and that over the image.

    Args:
        image: In RGB.
        truth: Labels, (height, width); None if they are not known.
        prediction: Labels, (height, width).
        names: Of the classes, in order.
        title: What was predicted by what.
    """
    drawn: dict[str, Any] = {"image": image}
    if truth is not None:
        drawn["truth"] = palette_image(truth).convert("RGB")
    drawn["prediction"] = palette_image(prediction).convert("RGB")
    drawn["prediction over the image"] = overlay(image, prediction)
    figure, axes = style.panels(
        len(drawn), columns=len(drawn), side=_SIDE, title=title, detail=_detail(truth, prediction)
    )
    for place, (name, picture) in zip(axes, drawn.items(), strict=True):
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.NEAREST)
        place.imshow(np.asarray(picture), interpolation="nearest")
        style.picture(place, name)
    style.legend(figure, _marks(truth, prediction, names))
    return figure


def _detail(truth: Labels | None, prediction: Labels) -> str:
    """Return how much of the labelled pixels is right."""
    labelled = None if truth is None else truth != IGNORE
    if labelled is None or not labelled.any():
        return ""
    right = float((prediction == truth)[labelled].mean())
    return f"{100 * right:.1f}% of the labelled pixels are right; white ones have no label"


def _marks(truth: Labels | None, prediction: Labels, names: Sequence[str]) -> list[Any]:
    """Return a coloured patch for each class that is there."""
    from matplotlib.patches import Patch

    there = np.unique(prediction if truth is None else np.stack([truth, prediction]))
    table = colours() / 255
    return [Patch(color=table[n], label=name) for n, name in enumerate(names) if n in there]
