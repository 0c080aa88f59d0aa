"""An image with its mask or its boxes, and what a model makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fambav.data.instances import Instances
from fambav.data.palette import Labels, colours, overlay, palette_image
from fambav.data.types import IGNORE
from fambav.tasks.detection import Arrays, picture
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
    _show(axes, drawn)
    style.legend(figure, _marks(truth, prediction, names))
    return figure


def boxes(
    image: Image.Image,
    truth: Instances | None,
    prediction: Arrays,
    names: Sequence[str],
    *,
    title: str,
) -> Figure:
    """Draw an image with its boxes, and with the predicted ones.

    Args:
        image: In RGB.
        truth: Its objects; None if they are not known.
        prediction: As `fambav.tasks.detection.on_image` returns it.
        names: Of the classes, in order.
        title: What was predicted by what.
    """
    large = max(1, _LARGEST // (2 * max(image.size)))  # lines and texts on small images
    panels: dict[str, Any] = {"image": image}
    known = {"truth": None if truth is None else truth._asdict(), "prediction": prediction}
    for name, objects in known.items():
        if objects is not None:
            sides = image.width * large, image.height * large
            enlarged = {**objects, "boxes": objects["boxes"] * large}
            enlarged.pop("masks", None)
            panels[name] = picture(image.resize(sides), enlarged, names)
    shown = "boxes of a score of 0.5 and above"
    figure, axes = style.panels(
        len(panels), columns=len(panels), side=_SIDE, title=title, detail=shown
    )
    _show(axes, panels)
    return figure


def _show(axes: Sequence[Any], pictures: Mapping[str, Image.Image]) -> None:
    for place, (name, each) in zip(axes, pictures.items(), strict=True):
        small = each.copy()
        small.thumbnail((_LARGEST, _LARGEST), Image.Resampling.NEAREST)
        place.imshow(np.asarray(small), interpolation="nearest")
        style.picture(place, name)


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
