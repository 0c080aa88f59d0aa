"""Images with boxes: what is known of each object, and transforms that treat it with its image.

Every draw comes from torch's global generator, so that seeding it decides the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from fambav.config import Augment
from fambav.data.palette import colours
from fambav.data.types import ArraySet, Channels
from fambav.timm_compat import torchvision

V2, TV = torchvision.transforms.v2, torchvision.tv_tensors
Target = dict[str, Tensor]


class Instances(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: (n, 4), float32: left, top, right, bottom in pixels.
        labels: (n,), int64, from 0.
        crowd: (n,), bool: boxes around many objects, which neither teach nor count as missed.
        masks: Returns the pixels of each, (n, height, width), bool.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    masks: Callable[[], NDArray[np.bool_]]


class InstanceArraySet(ArraySet):
    """Images held as one array, with as many objects in each.

    Args:
        images: (count, height, width, 3), uint8.
        labels: (count, n), of the objects.
        masks: (count, height, width), the number, from 1, of the object in each pixel; 0 for none.
            Each object has a pixel.
    """

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[Any], masks: NDArray[np.uint8]
    ) -> None:
        super().__init__(images, labels)
        self.masks = masks

    def __getitem__(self, index: int) -> tuple[Image.Image, Instances]:
        """Return an image in RGB and its objects; boxes are the tightest around the pixels."""
        labels = self.labels[index].astype(np.int64)
        masks = self.masks[index] == np.arange(1, len(labels) + 1)[:, None, None]
        ends = [_ends(masks.any(axis=axis)) for axis in (1, 2)]  # columns, rows
        boxes = np.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], axis=1)
        crowd = np.zeros(len(labels), dtype=bool)
        target = Instances(boxes.astype(np.float32), labels, crowd, lambda: masks)
        return Image.fromarray(self.images[index]), target


def _ends(there: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each row is true first, and behind where it is last."""
    return there.argmax(axis=1), there.shape[1] - there[:, ::-1].argmax(axis=1)


def fitted(size: tuple[int, int], within: tuple[int, int]) -> tuple[int, int]:
    """Return the largest height and width of one shape that lie within others, at least 1."""
    scale = min(most / side for side, most in zip(size, within, strict=True))
    height, width = (
        min(most, max(1, round(scale * side))) for side, most in zip(size, within, strict=True)
    )
    return height, width


class BoxTransform:
    """Resizes an image to lie within a size, keeping its shape, and fills it up to that.

    The filling, on the right and at the bottom, has the mean colour.

    Args:
        size: Height and width of what is returned, in pixels.
        statistics: Mean and standard deviation of the channels, to normalise with.
        masks: Whether masks are wanted.
        augment: Its hflip and color_jitter; None for evaluation, which draws nothing.
    """

    paired = True

    def __init__(
        self,
        size: tuple[int, int],
        statistics: tuple[Channels, Channels],
        *,
        masks: bool = False,
        augment: Augment | None = None,
    ) -> None:
        self.size, self.masks = size, masks
        jitter = None if augment is None else augment.color_jitter
        self.steps = V2.Compose(
            [
                *([] if augment is None else [V2.RandomHorizontalFlip(augment.hflip)]),
                *([V2.ColorJitter(jitter, jitter, jitter)] if jitter else []),
                V2.ToDtype({TV.Image: torch.float32, "others": None}, scale=True),
                V2.Normalize(*map(list, statistics)),
            ]
        )

    def __call__(self, image: Image.Image, target: Instances | None = None) -> Any:
        """Return the image, (3, height, width), float32, and its target if there is one.

        A target has `boxes`, `labels` and `crowd` as `Instances` has them, and if they are wanted
        `masks`, (n, height, width), uint8.
        """
        sides = (image.height, image.width)
        inner = fitted(sides, self.size)
        filling = [0, 0, self.size[1] - inner[1], self.size[0] - inner[0]]
        resize, fill = V2.Resize(list(inner), antialias=True), V2.Pad(filling)
        pixels = TV.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if target is None:
            whole: Tensor = fill(self.steps(resize(pixels)))
            return whole.as_subclass(Tensor)
        parts = {"boxes": TV.BoundingBoxes(target.boxes, format="XYXY", canvas_size=sides)}
        if self.masks:
            parts["masks"] = TV.Mask(torch.from_numpy(target.masks().astype(np.uint8)))
        whole, parts = fill(*self.steps(*resize(pixels, parts)))
        made = {name: part.as_subclass(Tensor) for name, part in parts.items()}
        made |= {name: torch.from_numpy(getattr(target, name)) for name in ("labels", "crowd")}
        return whole.as_subclass(Tensor), made


def stacked(samples: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Return images as one tensor, and their targets as a list: images differ in objects."""
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def drawn(
    image: Image.Image,
    boxes: NDArray[Any],
    labels: Sequence[int],
    texts: Sequence[str],
    masks: NDArray[np.bool_] | None = None,
) -> Image.Image:
    """Draw boxes, with a text above each, and masks over an image; the first ones lie on top.

    Args:
        image: In RGB.
        boxes: (n, 4), left, top, right, bottom in pixels.
        labels: n numbers, which colours follow from.
        texts: n of them.
        masks: (n, height, width).
    """
    table, picture = colours(), image.convert("RGB")
    inks = [tuple(map(int, table[label + 1])) for label in labels]
    for n in reversed(range(len(inks) if masks is not None else 0)):
        cover = Image.fromarray(masks[n].astype(np.uint8) * 128)  # type: ignore[index]
        picture.paste(Image.new("RGB", image.size, inks[n]), mask=cover)
    pen = ImageDraw.Draw(picture)
    wide = max(1, round(max(image.size) / 320))
    for n in reversed(range(len(inks))):
        left, top, right, bottom = map(float, boxes[n])
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), None, inks[n], wide)
        pen.text((left + wide, max(0.0, top - 11)), texts[n], fill=inks[n])
    return picture
