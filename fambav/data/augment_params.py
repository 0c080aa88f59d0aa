"""Sampled augmentation parameters: what a transform would do to an image, drawn without pixels.

    sampler(proxy image)  ->  one crop and resize, operations in order, boxes to erase

The transform of the CPU path itself runs, on an image without pixels, so that it makes the very
draws that it would make there, and in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fambav.data.transforms import TV, Blur
from fambav.timm_compat import timm

_WIDTH = 9  # numbers that an operation may need: an affine map and the colour around it

_COLOUR_OPS = {  # timm's operations that read nothing of an image but its pixels
    **{name: name for name in ("AutoContrast", "Equalize", "Invert", "Desaturate", "SolarizeAdd")},
    **{
        f"{name}{kind}": name
        for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
        for kind in ("", "Increasing", "Original")
    },
}
_IMAGE_METHODS = {  # timm's operations that call methods of ProxyImage
    *("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"),
    *("GaussianBlur", "GaussianBlurRand"),
}


Box = tuple[int, int, int, int]


class Step(NamedTuple):
    """One operation on one image.

    Attributes:
        stage: Index of the transform that it belongs to.
        turn: Number of operations before it in the same stage.
        name: Key of `device_ops.OPERATIONS`.
        values: Its parameters, up to _WIDTH numbers.
    """

    stage: int
    turn: int
    name: str
    values: tuple[float, ...]


class Crop(NamedTuple):
    """The part of an image that is resized, and to what.

    Attributes:
        box: Left, top, right and bottom, in pixels.
        size: Height and width of the result, in pixels.
        cubic: Bicubic, or else bilinear.
    """

    box: Box
    size: tuple[int, int]
    cubic: bool


class ImageParams(NamedTuple):
    """All that a transform does to one image.

    Attributes:
        crop: Comes first.
        steps: In order.
        erasings: Boxes to erase, as (top, bottom, left, right), and their fillings, (3, height or
            1, width or 1), float32.
    """

    crop: Crop
    steps: list[Step]
    erasings: list[tuple[Box, Tensor]]


class ProxyImage(Image.Image):
    """An image without pixels that records the operations on it.

    Args:
        size: Width and height, in pixels.

    Attributes:
        crop_params: The part of the image that remains, and how it is resized.
        stage: Index of the transform at work.
        steps: The operations after that.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size
        self.crop_params = Crop((0, 0, *size), size[::-1], cubic=True)
        self.stage = 0
        self.steps: list[Step] = []

    def getbands(self) -> tuple[str, ...]:
        """Return the names of the channels."""
        return ("R", "G", "B")

    def record(self, name: str, *values: float) -> ProxyImage:
        """Add an operation of the current stage."""
        turn = sum(step.stage == self.stage for step in self.steps)
        self.steps.append(Step(self.stage, turn, name, values))
        return self

    def copy(self) -> ProxyImage:
        """Return the image itself."""
        return self

    def crop(self, box: Any = None) -> ProxyImage:
        """Record the part of the image that is resized next, or taken as it is."""
        left, top, right, bottom = box
        self._size = (right - left, bottom - top)
        self.crop_params = Crop(box, self._size[::-1], cubic=True)
        return self

    def resize(self, size: Any, resample: Any = None, *_: Any) -> ProxyImage:
        """Record the size, (width, height), and the interpolation."""
        width, height = self._size = tuple(size)
        cubic = resample == Image.Resampling.BICUBIC
        self.crop_params = Crop(self.crop_params.box, (height, width), cubic)
        return self

    def transpose(self, method: Any) -> ProxyImage:
        """Record a flip or a rotation by a multiple of 90 degrees."""
        return self.record(Image.Transpose(method).name)

    def transform(
        self,
        size: Any,
        method: Any,
        data: Any = None,
        resample: int = 0,
        fill: int = 1,
        fillcolor: Any = None,
    ) -> ProxyImage:
        """Record an affine map from positions in the result to positions in the image."""
        a, b, c, d, e, f = data
        axes = "Both"
        if (d, e, f) == (0, 1, 0):
            axes = "Across"
        elif (a, b, c) == (1, 0, 0):
            axes, data = "Down", (e, d, f, b, a, c)  # as if rows were columns
        kind = "Cubic" if resample == Image.Resampling.BICUBIC else "Linear"
        return self.record(f"Affine{axes}{kind}", *data, *fillcolor)

    def filter(self, filter: Any) -> ProxyImage:
        """Record a Gaussian blur."""
        return self.record("Blur", *_blur_weights(filter.radius))


class _ProxyTensor:
    """Stands for the tensor, (3, *size), whose boxes timm erases."""

    dtype = torch.float32

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self.erasings: list[tuple[Box, Tensor]] = []

    def size(self) -> tuple[int, int, int]:
        return (3, *self._size)

    def __setitem__(self, box: tuple[slice, slice, slice], filling: Tensor) -> None:
        _, rows, columns = box
        sides = rows.start, rows.stop, columns.start, columns.stop
        self.erasings.append((sides, filling.clone()))


class ProxySamples:
    """Samples without pixels, whose labels are their indices.

    Args:
        count: Number of samples.
        image_size: Height and width of every image, in pixels.
    """

    def __init__(self, count: int, *, image_size: tuple[int, int]) -> None:
        self._count, (self._height, self._width) = count, image_size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[ProxyImage, int]:
        if not 0 <= index < self._count:
            raise IndexError(f"index is {index}, expected one below {self._count}")
        return ProxyImage((self._width, self._height)), index


Recorder = Callable[[ProxyImage], ProxyImage]


def _record(name: str, image: ProxyImage, *values: float, **_: Any) -> ProxyImage:
    """Record an operation by its name, with the arguments that timm gives it."""
    if name == "Desaturate":
        return image.record("Color", min(1.0, max(0.0, 1.0 - values[0])))
    return image.record(name, *values)


def _record_shift(step: Any, image: ProxyImage) -> ProxyImage:
    """Record the offset of a random crop of a padded image."""
    padding, (width, height) = step.padding, image.size
    if (height, width) != tuple(step.size):
        raise ValueError(f"images are {height} x {width} once resized, expected square ones")
    padded = torch.empty(1, height + 2 * padding, width + 2 * padding, device="meta")
    top, left, *_ = step.get_params(padded, step.size)
    name = "ShiftReflect" if step.padding_mode == "reflect" else "Shift"
    return image.record(name, top - padding, left - padding)


def _jitter(step: Any) -> Recorder:
    ranges = [getattr(step, name) for name in signature(step.get_params).parameters]
    return partial(_record_jitter, step.get_params, ranges)


def _record_jitter(get_params: Any, ranges: list[Any], image: ProxyImage) -> ProxyImage:
    """Record the factors of colours in the sampled order."""
    order, *factors = get_params(*ranges)
    for index in order.tolist():
        if factors[index] is not None:
            image.record(("Brightness", "Contrast", "Color")[index], factors[index])
    return image


def _record_solarize(step: Any, image: ProxyImage) -> ProxyImage:
    if torch.rand(1).item() < step.p:
        return image.record("Solarize", step.threshold)
    return image


def _policy(step: Any) -> Any:
    """Return a RandAugment that records its operations on colours."""
    step = deepcopy(step)
    for operation in step.ops:
        if operation.name in _COLOUR_OPS:
            operation.aug_fn = partial(_record, _COLOUR_OPS[operation.name])
        elif operation.name not in _IMAGE_METHODS:
            raise ValueError(
                f"aa names {operation.name}, expected operations that --gpu-augment offers: "
                f"{', '.join(sorted({*_COLOUR_OPS.values(), *_IMAGE_METHODS}))}"
            )
    return step


def _choice(step: Any) -> Any:
    step = copy(step)
    step.transforms = [_recorder(each) for each in step.transforms]
    return step


_RECORDERS: dict[type, Callable[[Any], Recorder]] = {
    **dict.fromkeys(  # these call methods of ProxyImage
        (
            timm.data.RandomResizedCropAndInterpolation,
            timm.data.transforms.ResizeKeepRatio,
            TV.Resize,
            TV.RandomHorizontalFlip,
            TV.RandomAffine,
            Blur,
        ),
        lambda step: step,
    ),
    timm.data.auto_augment.RandAugment: _policy,
    TV.RandomCrop: lambda step: partial(_record_shift, step),
    TV.RandomChoice: _choice,
    TV.ColorJitter: _jitter,
    TV.Grayscale: lambda _: partial(_record, "Grayscale"),
    TV.RandomSolarize: lambda step: partial(_record_solarize, step),
}


def _recorder(step: Any) -> Recorder:
    """Return a function that records on an image what `step` does to it."""
    make = _RECORDERS.get(type(step))
    if make is None:
        raise ValueError(
            f"aa is a policy with {type(step).__name__}, expected rand-* such as "
            "rand-m9-mstd0.5-inc1, or none, with --gpu-augment"
        )
    return make(step)


class ParamSampler:
    """A transform of `fambav.data.transforms` that samples its parameters only.

    Attributes:
        normalize: Its step that normalises, for a tensor in [0, 1].

    Args:
        transform: The transform.

    Raises:
        ValueError: If it has a step that cannot be carried out on batches.
    """

    def __init__(self, transform: Any) -> None:
        steps = list(transform.transforms)
        end = next(index for index, step in enumerate(steps) if isinstance(step, TV.ToTensor))
        self._recorders = [_recorder(step) for step in steps[:end]]
        self.normalize, *erasing = steps[end + 1 :]
        self._erase = erasing[0] if erasing else None

    def __call__(self, image: ProxyImage) -> ImageParams:
        """Sample for one image, from the global generators of the CPU."""
        for stage, record in enumerate(self._recorders):
            image.stage = stage
            record(image)
        tensor = _ProxyTensor(image.size[::-1])
        if self._erase is not None:
            self._erase(tensor)
        return ImageParams(image.crop_params, image.steps, tensor.erasings)


class BatchParams(NamedTuple):
    """The parameters of a batch, sorted by operation.

    Attributes:
        indices: Of the samples, (batch,), int64.
        boxes: Left, top, right and bottom of the crops, (batch, 4), float64.
        cubic: Bicubic, or else bilinear, (batch,), bool.
        size: Height and width that crops are resized to, in pixels.
        groups: Name of an operation, first and last + 1 of its rows; in order.
        rows: Images that the operations work on, grouped, (rows,), int64, 0 .. batch - 1.
        values: Parameters of each row, (rows, _WIDTH), float64.
        erasings: For each box to erase the image, its four sides, and height and width of its
            filling.
        filling: All fillings one after the other, float32.
    """

    indices: Tensor
    boxes: Tensor
    cubic: Tensor
    size: tuple[int, int]
    groups: tuple[tuple[str, int, int], ...]
    rows: Tensor
    values: Tensor
    erasings: tuple[tuple[int, ...], ...]
    filling: Tensor


def collate_params(samples: Sequence[tuple[ImageParams, int]]) -> BatchParams:
    """Sort the parameters of a batch by operation.

    Operations of one stage and turn are independent of each other, since each image has one.
    """
    steps = sorted(
        (step.stage, step.turn, step.name, row, step.values)
        for row, (params, _) in enumerate(samples)
        for step in params.steps
    )
    values = np.zeros((len(steps), _WIDTH))
    for row, (*_, numbers) in enumerate(steps):
        values[row, : len(numbers)] = numbers
    groups, start = [], 0
    for (_, _, name), group in groupby(steps, key=lambda step: step[:3]):
        stop = start + len(list(group))
        groups.append((name, start, stop))
        start = stop
    erasings = [
        (row, box, filling)
        for row, (params, _) in enumerate(samples)
        for box, filling in params.erasings
    ]
    return BatchParams(
        indices=torch.tensor([index for _, index in samples]),
        boxes=torch.tensor([params.crop.box for params, _ in samples], dtype=torch.float64),
        cubic=torch.tensor([params.crop.cubic for params, _ in samples]),
        size=samples[0][0].crop.size,
        groups=tuple(groups),
        rows=torch.tensor([row for *_, row, _ in steps], dtype=torch.int64),
        values=torch.from_numpy(values),
        erasings=tuple((row, *box, *filling.shape[1:]) for row, box, filling in erasings),
        filling=torch.cat([torch.empty(0), *(filling.flatten() for *_, filling in erasings)]),
    )


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
