"""What a transform would do to an image, noted instead of done.

    recipe()  ->  one crop and resize, steps in order, boxes to erase

The transform of the CPU path itself runs, on an image without pixels, so that it makes the very
draws that it would make there, and in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fambav.data.sampling import Key
from fambav.data.transforms import Blur
from fambav.seeding import seed_cpu
from fambav.timm_compat import timm, torchvision

KIT = torchvision.transforms
WIDTH = 9  # numbers that a step may need: an affine map and the colour around it

_COLOURS = {  # timm's operations that read nothing of an image but its pixels
    "AutoContrast": "AutoContrast",
    "Equalize": "Equalize",
    "Invert": "Invert",
    "Desaturate": "Desaturate",
    "SolarizeAdd": "SolarizeAdd",
    **{
        f"{name}{kind}": name
        for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
        for kind in ("", "Increasing", "Original")
    },
}
_MOVES = {
    *("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"),
    *("GaussianBlur", "GaussianBlurRand"),
}


class Step(NamedTuple):
    """One operation on one image.

    Attributes:
        stage: Number of the transform's step that it belongs to.
        turn: How many operations came before it in the same stage.
        name: Key of a table of operations on batches.
        values: What it needs, up to WIDTH numbers.
    """

    stage: int
    turn: int
    name: str
    values: tuple[float, ...]


class Patch(NamedTuple):
    """A box to erase, in pixels of the result, and what to fill in, (3, height or 1, width or 1).

    Attributes:
        rows: From and to.
        columns: From and to.
        filling: float32.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    filling: Tensor


class Resizing(NamedTuple):
    """The part of an image that is resized, and to what.

    Attributes:
        box: Left, top, right and bottom, in pixels.
        size: Height and width of the result, in pixels.
        cubic: Bicubic, or else bilinear.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    cubic: bool


class Record(NamedTuple):
    """All that a transform does to one image."""

    resizing: Resizing
    steps: tuple[Step, ...]
    patches: tuple[Patch, ...]


class Recording(Image.Image):
    """An image without pixels that notes what is done to it, and stays the one it is.

    Args:
        size: Width and height, in pixels.

    Attributes:
        resizing: The part of the image that is left, and how it is resized.
        stage: Number of the transform's step that is at work.
        steps: What is done after that.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size
        self.resizing = Resizing((0, 0, *size), size[::-1], cubic=True)
        self.stage = 0
        self.steps: list[Step] = []

    def getbands(self) -> tuple[str, ...]:
        """Return the names of the channels."""
        return ("R", "G", "B")

    def note(self, name: str, *values: float) -> Recording:
        """Note a step of the current stage."""
        turn = sum(step.stage == self.stage for step in self.steps)
        self.steps.append(Step(self.stage, turn, name, values))
        return self

    def copy(self) -> Recording:
        """Note nothing."""
        return self

    def crop(self, box: Any = None) -> Recording:
        """Note which part of the image is resized next, or taken as it is."""
        left, top, right, bottom = box
        self._size = (right - left, bottom - top)
        self.resizing = Resizing(box, self._size[::-1], cubic=True)
        return self

    def resize(self, size: Any, resample: Any = None, *_: Any) -> Recording:
        """Note the size, (width, height), and the interpolation."""
        width, height = self._size = tuple(size)
        cubic = resample == Image.Resampling.BICUBIC
        self.resizing = Resizing(self.resizing.box, (height, width), cubic)
        return self

    def transpose(self, method: Any) -> Recording:
        """Note a flip or a rotation by a multiple of 90 degrees."""
        return self.note(Image.Transpose(method).name)

    def transform(
        self,
        size: Any,
        method: Any,
        data: Any = None,
        resample: int = 0,
        fill: int = 1,
        fillcolor: Any = None,
    ) -> Recording:
        """Note an affine map from places in the result to places in the image."""
        a, b, c, d, e, f = data
        name = "Turn"
        if (d, e, f) == (0, 1, 0):
            name = "Across"
        elif (a, b, c) == (1, 0, 0):
            name, data = "Down", (e, d, f, b, a, c)  # as if rows were columns
        name += "Cubic" if resample == Image.Resampling.BICUBIC else "Linear"
        return self.note(name, *data, *fillcolor)

    def filter(self, filter: Any) -> Recording:
        """Note a Gaussian blur."""
        return self.note("Blur", *_blur_weights(filter.radius))


class _Patches:
    """Stands for an image while timm erases boxes of it.

    Args:
        size: Height and width, in pixels.
    """

    dtype = torch.float32

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self.found: list[Patch] = []

    def size(self) -> tuple[int, int, int]:
        return (3, *self._size)

    def __setitem__(self, place: tuple[slice, slice, slice], filling: Tensor) -> None:
        _, rows, columns = place
        self.found.append(
            Patch((rows.start, rows.stop), (columns.start, columns.stop), filling.clone())
        )


class _Note:
    """Notes an operation by its name, with the arguments that timm gives it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, image: Recording, *values: float, **_: Any) -> Recording:
        if self.name == "Desaturate":
            return image.note("Color", min(1.0, max(0.0, 1.0 - values[0])))
        return image.note(self.name, *values)


class _Shift:
    """Notes where a padded image is cut."""

    def __init__(self, step: Any) -> None:
        self.step = step
        self.name = "ShiftMirrored" if step.padding_mode == "reflect" else "Shift"

    def __call__(self, image: Recording) -> Recording:
        by, (width, height) = self.step.padding, image.size
        if (height, width) != tuple(self.step.size):
            raise ValueError(f"images are {height} x {width} once resized, expected square ones")
        padded = torch.empty(1, height + 2 * by, width + 2 * by, device="meta")
        top, left, *_ = self.step.get_params(padded, self.step.size)
        return image.note(self.name, top - by, left - by)


class _Jitter:
    """Notes changes of brightness, contrast and saturation in a drawn order."""

    def __init__(self, step: Any) -> None:
        self.step = step

    def __call__(self, image: Recording) -> Recording:
        step = self.step
        order, *factors = step.get_params(step.brightness, step.contrast, step.saturation, None)
        names = ("Brightness", "Contrast", "Color", "")
        for place in order.tolist():
            if factors[place] is not None:
                image.note(names[place], factors[place])
        return image


class _Solarize:
    """Notes a solarisation, if it is drawn."""

    def __init__(self, step: Any) -> None:
        self.step = step

    def __call__(self, image: Recording) -> Recording:
        if torch.rand(1).item() < self.step.p:
            return image.note("Solarize", self.step.threshold)
        return image


def _policy(step: Any) -> Any:
    """Return a RandAugment that notes its operations on colours."""
    step = deepcopy(step)
    for operation in step.ops:
        if operation.name in _COLOURS:
            operation.aug_fn = _Note(_COLOURS[operation.name])
        elif operation.name not in _MOVES:
            raise ValueError(
                f"aa names {operation.name}, expected operations that --gpu-augment offers: "
                f"{', '.join(sorted({*_COLOURS.values(), *_MOVES}))}"
            )
    return step


def _choice(step: Any) -> Any:
    step = copy(step)
    step.transforms = [_noting(each) for each in step.transforms]
    return step


def _itself(step: Any) -> Any:
    return step


_NOTING: dict[type, Callable[[Any], Callable[[Recording], Recording]]] = {
    timm.data.RandomResizedCropAndInterpolation: _itself,
    timm.data.transforms.ResizeKeepRatio: _itself,
    timm.data.auto_augment.RandAugment: _policy,
    KIT.Resize: _itself,
    KIT.RandomHorizontalFlip: _itself,
    KIT.RandomAffine: _itself,
    KIT.RandomCrop: _Shift,
    KIT.RandomChoice: _choice,
    KIT.ColorJitter: _Jitter,
    KIT.Grayscale: lambda _: _Note("Grey"),
    KIT.RandomSolarize: _Solarize,
    Blur: _itself,
}


def _noting(step: Any) -> Callable[[Recording], Recording]:
    """Return what notes on a recording what `step` does to an image."""
    found = _NOTING.get(type(step))
    if found is None:
        raise ValueError(
            f"aa is a policy with {type(step).__name__}, expected rand-* such as "
            "rand-m9-mstd0.5-inc1, or none, with --gpu-augment"
        )
    return found(step)


class Recipe:
    """A transform of `fambav.data.transforms` that notes what it would do.

    Attributes:
        normalize: Its step that normalises, for a tensor in [0, 1].

    Args:
        transform: What to follow.
        image_size: Height and width of every image, in pixels.

    Raises:
        ValueError: If it has a step that cannot be carried out on batches.
    """

    def __init__(self, transform: Any, *, image_size: tuple[int, int]) -> None:
        steps = list(transform.transforms)
        end = next(place for place, step in enumerate(steps) if isinstance(step, KIT.ToTensor))
        self._steps = [_noting(step) for step in steps[:end]]
        self.normalize, *last = steps[end + 1 :]
        self._erasing = last[0] if last else None
        self._height, self._width = image_size

    def __call__(self) -> Record:
        """Draw what happens to one image, from the global generators of the CPU."""
        image = Recording((self._width, self._height))
        for stage, step in enumerate(self._steps):
            image.stage = stage
            step(image)
        width, height = image.size
        patches = _Patches((height, width))
        if self._erasing is not None:
            self._erasing(patches)
        return Record(image.resizing, tuple(image.steps), tuple(patches.found))


class Orders(NamedTuple):
    """What is to be done to the images of a batch.

    Attributes:
        places: Places in the set, (batch,), int64.
        boxes: What is resized, (batch, 4), float64: left, top, right, bottom.
        cubic: Bicubic, or else bilinear, (batch,), bool.
        size: Height and width of what is resized, in pixels.
        groups: Name of an operation, first and last + 1 of its rows; in order.
        rows: Places in the batch, grouped, (rows,), int64.
        values: What each of them needs, (rows, WIDTH), float64.
        patches: Place in the batch and four sides of each box to erase, and how many numbers
            its filling has along rows and columns.
        filling: All fillings one after the other, float32.
    """

    places: Tensor
    boxes: Tensor
    cubic: Tensor
    size: tuple[int, int]
    groups: tuple[tuple[str, int, int], ...]
    rows: Tensor
    values: Tensor
    patches: tuple[tuple[int, ...], ...]
    filling: Tensor


def collate(drawn: Sequence[tuple[int, Record]]) -> Orders:
    """Sort what happens to the images of a batch by operation.

    Operations of one stage and turn are independent of each other, since each image has one.
    """
    steps = sorted(
        (step.stage, step.turn, step.name, row, step.values)
        for row, (_, record) in enumerate(drawn)
        for step in record.steps
    )
    values = np.zeros((len(steps), WIDTH))
    groups: list[tuple[str, int, int]] = []
    known = None
    for place, (stage, turn, name, _, numbers) in enumerate(steps):
        values[place, : len(numbers)] = numbers
        start = place
        if known == (stage, turn, name):
            start = groups.pop()[1]
        groups.append((name, start, place + 1))
        known = (stage, turn, name)
    patches = [(row, patch) for row, (_, record) in enumerate(drawn) for patch in record.patches]
    fillings = [patch.filling.flatten() for _, patch in patches]
    return Orders(
        places=torch.tensor([place for place, _ in drawn]),
        boxes=torch.tensor([r.resizing.box for _, r in drawn], dtype=torch.float64),
        cubic=torch.tensor([r.resizing.cubic for _, r in drawn]),
        size=drawn[0][1].resizing.size,
        groups=tuple(groups),
        rows=torch.tensor([row for *_, row, _ in steps], dtype=torch.int64),
        values=torch.from_numpy(values),
        patches=tuple((r, *p.rows, *p.columns, *p.filling.shape[1:]) for r, p in patches),
        filling=torch.cat(fillings) if fillings else torch.empty(0),
    )


class Draws(Dataset[tuple[int, Record]]):
    """What happens to a sample, by (epoch, position, place).

    Drawing reseeds the global CPU generators of the process, with the keys of `loaders.Augmented`.

    Args:
        recipe: Draws.
        seed: Seed of the run.
    """

    def __init__(self, recipe: Recipe, *, seed: int) -> None:
        self.recipe, self.seed = recipe, seed

    def __getitem__(self, name: Key) -> tuple[int, Record]:
        epoch, position, place = name
        seed_cpu(self.seed, "augment", epoch, position)
        return place, self.recipe()


def _blur_weights(radius: float) -> tuple[float, ...]:
    """Return the weights of a box blur, thrice of which Pillow makes a Gaussian one.

    Args:
        radius: Standard deviation in pixels, less than 2.4.

    Returns:
        Weights at distance 0, 1 and 2, times 2**24.

    Source: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering", SSVM 2011, with three passes, rounded as Pillow does.
    """
    passes = 3
    variance = np.float32(radius * radius / passes)
    whole = int(np.floor((np.sqrt(np.float32(12.0 * variance + 1.0)) - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance)
    part /= 6.0 * (variance - (whole + 1) ** 2)
    inner = int(np.float32(1 << 24) / np.float32((whole + np.float32(part)) * 2 + 1))
    edge = ((1 << 24) - (2 * whole + 1) * inner) // 2
    return (inner, edge, 0) if whole == 0 else (inner, inner, edge)
