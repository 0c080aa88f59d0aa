"""From an image to a tensor, and mixing of batches: DeiT's recipe, 3-Augment, evaluation.

Every draw comes from the global generators of Python, numpy and torch, so that seeding them
decides the result.

Source: Touvron et al., "Training data-efficient image transformers", arXiv:2012.12877, table 9;
"DeiT III", arXiv:2204.07118, section 3 (3-Augment); Zhang et al., "mixup", arXiv:1710.09412; Yun et
al., "CutMix", arXiv:1905.04899; all through timm, whose boxes of an odd side are one pixel larger
than in timm 0.4, which DeiT used.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from fambav.config import Augment, Data, policy
from fambav.data.types import IMAGENET_MEAN, IMAGENET_STD, Channels
from fambav.seeding import key
from fambav.timm_compat import timm, torchvision

Transform = Callable[[Image.Image], Tensor]
Size = tuple[int, int]
TV = torchvision.transforms
_SMALL = 32  # pixels up to which the original takes an image whole
_PADDING = 4


class Blur:
    """Blurs an image by a Gaussian whose radius is drawn from 0.1 to 2 pixels."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the blurred image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def train_transform(
    augment: Augment | None = None,
    *,
    input_size: int | Size,
    mean: Channels = IMAGENET_MEAN,
    std: Channels = IMAGENET_STD,
) -> Transform:
    """Return the augmentation of training images: DeiT's, or 3-Augment.

    DeiT: a crop of 8 to 100 percent of the image is resized to `input_size`; if that is at most 32
    pixels, the whole image is resized and then shifted by up to 4 pixels, as the original does
    with images that are small already; `affine`, if it is on, takes the place of that shift and
    has a black border.  A flip, a policy (or colour jitter) and erasing follow.

    3-Augment has one of grey, solarise and blur in place of the policy, and no erasing.  With `src`
    ("simple random crop") the image is resized and shifted by up to 4 pixels over a mirrored
    border, instead of cropped.

    Args:
        augment: The settings; None for the defaults, which are DeiT's.
        input_size: Height and width of the result, in pixels; one number for a square.
        mean: Mean of each channel to normalise with.
        std: Standard deviation of each channel to normalise with.

    Returns:
        A transform to (3, height, width), float32.

    Raises:
        ValueError: If timm knows no such policy, or not all of it, or no such interpolation.
    """
    augment, size = augment or Augment(), _size(input_size)
    steps = _three_augment if augment.three_augment else _deit
    transform: Transform = TV.Compose(steps(augment, size, mean, std))
    return transform


def _deit(augment: Augment, size: Size, mean: Channels, std: Channels) -> list[Any]:
    crop, *rest = _timm_steps(augment, size, mean, std)
    affine = TV.RandomAffine(
        augment.affine, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=_mode("bilinear")
    )
    if max(size) <= _SMALL:
        crop = TV.Resize(size, _mode(augment.train_interpolation))
        return [crop, affine if augment.affine else TV.RandomCrop(size, padding=_PADDING), *rest]
    return [crop, *([affine] if augment.affine else []), *rest]


def _timm_steps(augment: Augment, size: Size, mean: Channels, std: Channels) -> list[Any]:
    """Return timm's augmentation, of which a policy it would not carry out whole is refused."""
    aa = None if augment.aa in ("", "none") else augment.aa
    jitter: Any = augment.color_jitter or None  # None, which timm does not declare, is none
    try:
        if aa is not None:
            policy(aa)
    except ValueError as error:
        raise ValueError(f"aa is {aa!r}, expected {error}") from None
    try:
        transform = timm.data.create_transform(
            size,
            is_training=True,
            hflip=augment.hflip,
            color_jitter=jitter,
            auto_augment=aa,
            interpolation=augment.train_interpolation,
            re_prob=augment.reprob,
            re_mode=augment.remode,
            re_count=augment.recount,
            mean=mean,
            std=std,
        )
    except (AssertionError, KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"aa is {aa!r} and train_interpolation "
            f"{augment.train_interpolation!r}, expected a policy of timm's, such as "
            "'rand-m9-mstd0.5-inc1' or 'none', and 'random', 'bilinear' or 'bicubic' "
            f"({type(error).__name__}: {error})"
        ) from None
    steps: list[Any] = transform.transforms
    return steps


def _three_augment(augment: Augment, size: Size, mean: Channels, std: Channels) -> list[Any]:
    jitter = augment.color_jitter
    if augment.src:
        shorter = size[0] if size[0] == size[1] else size
        crop = [
            TV.Resize(shorter, _mode("bicubic")),
            TV.RandomCrop(size, padding=_PADDING, padding_mode="reflect"),
        ]
    else:
        crop = [timm.data.RandomResizedCropAndInterpolation(size, interpolation="bicubic")]
    return [
        *crop,
        *([TV.RandomHorizontalFlip(augment.hflip)] if augment.hflip > 0 else []),
        TV.RandomChoice([TV.Grayscale(3), TV.RandomSolarize(threshold=128, p=1.0), Blur()]),
        *([TV.ColorJitter(jitter, jitter, jitter)] if jitter else []),
        TV.ToTensor(),
        TV.Normalize(mean, std),
    ]


def eval_transform(
    *,
    input_size: int | Size,
    eval_crop_ratio: float = Data.eval_crop_ratio,
    mean: Channels = IMAGENET_MEAN,
    std: Channels = IMAGENET_STD,
) -> Transform:
    """Return what evaluation does to an image.

    The image is resized, in its own proportions, until it just covers input_size / eval_crop_ratio,
    and the centre is cut out: for a square, the shorter side is resized to that.  At most 32 pixels
    are not worth a border: the whole image is resized to `input_size` and nothing is cut, as in the
    original, which takes such images as they are.

    Args:
        input_size: Height and width of the result, in pixels; one number for a square.
        eval_crop_ratio: Share of the shorter side that is kept, in (0, 1].
        mean: Mean of each channel to normalise with.
        std: Standard deviation of each channel to normalise with.

    Returns:
        A transform to (3, height, width), float32, that draws nothing.

    Raises:
        ValueError: If eval_crop_ratio is not in (0, 1].
    """
    if not 0 < eval_crop_ratio <= 1:
        raise ValueError(f"eval_crop_ratio is {eval_crop_ratio}, expected more than 0, at most 1")
    size = _size(input_size)
    crop = eval_crop(size, eval_crop_ratio)
    transform: Transform
    if crop["crop_mode"] == "squash":
        resize = TV.Resize(size, _mode(crop["interpolation"]))
        transform = TV.Compose([resize, TV.ToTensor(), TV.Normalize(mean, std)])
    else:
        transform = timm.data.create_transform(size, is_training=False, mean=mean, std=std, **crop)
    return transform


def eval_crop(input_size: Size, eval_crop_ratio: float) -> dict[str, Any]:
    """Return how `eval_transform` resizes and cuts an image, as arguments of timm.

    Args:
        input_size: Height and width of the result, in pixels.
        eval_crop_ratio: As for `eval_transform`.
    """
    whole = max(input_size) <= _SMALL
    return {
        "interpolation": "bicubic",
        "crop_pct": 1.0 if whole else eval_crop_ratio,
        "crop_mode": "squash" if whole else "center",
    }


class Mix:
    """Mixes a batch with itself reversed, as timm does, the same way on every process.

    Args:
        inner: timm's Mixup.
        seed: Seed of the run.
    """

    def __init__(self, inner: Any, *, seed: int) -> None:
        self.inner, self.seed = inner, seed

    def __call__(self, images: Tensor, targets: Tensor, *, update: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        The draws depend on the seed and the update alone, so every process and micro-batch of an
        update takes the same share and the same box; samples are paired within the batch.

        Args:
            images: (batch, 3, height, width); changed in place.
            targets: Labels, (batch,), int64.
            update: Number of the update, from 0.

        Returns:
            The images, and targets (batch, classes), float32, smoothed.
        """
        np.random.seed(key(self.seed, "mixup", update) % 2**32)
        mixed: tuple[Tensor, Tensor] = self.inner(images, targets)
        return mixed


def mixup(
    augment: Augment | None = None, *, num_classes: int, batch_size: int, seed: int
) -> Mix | None:
    """Return what mixes the batches of a run, by mixup and CutMix.

    Args:
        augment: The settings; None for the defaults.
        num_classes: Length of a target.
        batch_size: Samples in a micro-batch of one process.
        seed: Seed of the run.

    Returns:
        The mixing, or None if mixup and cutmix are both off.

    Raises:
        ValueError: If the batch is odd, or cutmix_minmax is no span within [0, 1].
    """
    augment = augment or Augment()
    span = augment.cutmix_minmax
    if not (augment.mixup > 0 or augment.cutmix > 0 or span is not None):
        return None
    if batch_size % 2:
        raise ValueError(
            f"batch_size is {batch_size}, expected an even number, because mixup and cutmix mix a "
            "batch with itself reversed; or switch both off with --mixup 0 --cutmix 0"
        )
    if span is not None and (len(span) != 2 or not 0 <= span[0] < span[1] <= 1):
        raise ValueError(f"cutmix_minmax is {list(span)}, expected two rising numbers in 0 .. 1")
    inner = timm.data.Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        cutmix_minmax=span,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        mode=augment.mixup_mode,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
    return Mix(inner, seed=seed)


def _size(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _mode(interpolation: str) -> Any:
    modes = TV.InterpolationMode
    return modes.BICUBIC if interpolation == "bicubic" else modes.BILINEAR
