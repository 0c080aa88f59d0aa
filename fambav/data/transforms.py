"""From an image to a tensor: DeiT's recipe, 3-Augment, and what evaluation does.

Every draw comes from the global generators of Python, numpy and torch, so that seeding them
decides the result.

Source: Touvron et al., "Training data-efficient image transformers", arXiv:2012.12877, table 9;
"DeiT III", arXiv:2204.07118, section 3 (3-Augment); through timm's transforms.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageFilter
from torch import Tensor

from fambav.config import policy
from fambav.data.arrays import IMAGENET_MEAN, IMAGENET_STD, Triple
from fambav.timm_compat import timm, torchvision

Transform = Callable[[Image.Image], Tensor]
Size = tuple[int, int]
_SMALL = 32  # pixels up to which the original takes an image whole
_PADDING = 4


class Blur:
    """Blurs an image by a Gaussian whose radius is drawn from 0.1 to 2 pixels."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the blurred image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def train_transform(
    *,
    input_size: int | Size,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float | None = 0.3,
    train_interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    hflip: float = 0.5,
    affine: float = 0.0,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
) -> Transform:
    """Return DeiT's augmentation.

    A crop of 8 to 100 percent of the image is resized to `input_size`; if that is at most 32
    pixels, the whole image is resized and then shifted by up to 4 pixels, as the original does
    with images that are small already; `affine`, if it is on, takes the place of that shift.

    Args:
        input_size: Height and width of the result, in pixels; one number for a square.
        aa: timm's name of an augmentation policy; None, "" or "none" for none.
        color_jitter: Strength of colour jitter, used without a policy; 0 or None for none.
        train_interpolation: "random", "bilinear" or "bicubic".
        reprob: Probability of erasing a box.
        remode: What erasing fills in: "pixel", "rand" or "const".
        recount: Most boxes to erase.
        hflip: Probability of a horizontal flip.
        affine: Largest rotation, in degrees, with a shift and a change of scale of up to 10
            percent each; 0 for none of these.  The border is black.
        mean: Mean of each channel to normalise with.
        std: Standard deviation of each channel to normalise with.

    Returns:
        A transform to (3, height, width), float32.

    Raises:
        ValueError: If timm knows no such policy, or not all of it, or no such interpolation.
    """
    size = _size(input_size)
    transform = _recipe(
        size,
        hflip=hflip,
        color_jitter=color_jitter or None,
        auto_augment=None if aa in ("", "none") else aa,
        interpolation=train_interpolation,
        re_prob=reprob,
        re_mode=remode,
        re_count=recount,
        mean=mean,
        std=std,
    )
    crop, *rest = transform.transforms
    if max(size) <= _SMALL:
        crop = torchvision.transforms.Resize(size, _mode(train_interpolation))
        rest[:0] = _affine(affine) or [torchvision.transforms.RandomCrop(size, padding=_PADDING)]
    else:
        rest[:0] = _affine(affine)
    return _compose([crop, *rest])


def _recipe(size: Size, **options: Any) -> Any:
    """Return timm's augmentation."""
    aa = options["auto_augment"]
    try:
        if aa is not None:
            policy(aa)
    except ValueError as error:
        raise ValueError(f"aa is {aa!r}, expected {error}") from None
    try:
        return timm.data.create_transform(size, is_training=True, **options)
    except (AssertionError, KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"aa is {aa!r} and train_interpolation "
            f"{options['interpolation']!r}, expected a policy of timm's, such as "
            "'rand-m9-mstd0.5-inc1' or 'none', and 'random', 'bilinear' or 'bicubic' "
            f"({type(error).__name__}: {error})"
        ) from None


def three_augment(
    *,
    input_size: int | Size,
    src: bool = False,
    color_jitter: float | None = 0.3,
    hflip: float = 0.5,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
) -> Transform:
    """Return 3-Augment: one of grey, solarise and blur, in place of a policy and of erasing.

    Args:
        input_size: Height and width of the result, in pixels; one number for a square.
        src: Whether to resize the image and shift it by up to 4 pixels over a mirrored border,
            instead of taking a crop of 8 to 100 percent ("simple random crop").
        color_jitter: Strength of colour jitter; 0 or None for none.
        hflip: Probability of a horizontal flip.
        mean: Mean of each channel to normalise with.
        std: Standard deviation of each channel to normalise with.

    Returns:
        A transform to (3, height, width), float32.
    """
    size, kit = _size(input_size), torchvision.transforms
    if src:
        shorter = size[0] if size[0] == size[1] else size
        crop = [
            kit.Resize(shorter, _mode("bicubic")),
            kit.RandomCrop(size, padding=_PADDING, padding_mode="reflect"),
        ]
    else:
        crop = [timm.data.RandomResizedCropAndInterpolation(size, interpolation="bicubic")]
    choices = [kit.Grayscale(3), kit.RandomSolarize(threshold=128, p=1.0), Blur()]
    return _compose(
        [
            *crop,
            *([kit.RandomHorizontalFlip(hflip)] if hflip > 0 else []),
            kit.RandomChoice(choices),
            *([kit.ColorJitter(*3 * [color_jitter])] if color_jitter else []),
            kit.ToTensor(),
            kit.Normalize(mean, std),
        ]
    )


def eval_transform(
    *,
    input_size: int | Size,
    eval_crop_ratio: float = 0.875,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
) -> Transform:
    """Return what evaluation does to an image.

    The shorter side is resized to input_size / eval_crop_ratio and the centre cut out.  At most 32
    pixels are not worth a border: the whole image is resized to `input_size` and nothing is cut,
    as in the original, which takes such images as they are.

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
    told = eval_words(size, eval_crop_ratio)
    if told["crop_mode"] == "squash":
        kit = torchvision.transforms
        mode = _mode(told["interpolation"])
        return _compose([kit.Resize(size, mode), kit.ToTensor(), kit.Normalize(mean, std)])
    transform: Transform = timm.data.create_transform(
        size, is_training=False, mean=mean, std=std, **told
    )
    return transform


def eval_words(input_size: Size, eval_crop_ratio: float) -> dict[str, Any]:
    """Say in timm's words how `eval_transform` resizes and cuts an image.

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


def _size(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _mode(interpolation: str) -> Any:
    modes = torchvision.transforms.InterpolationMode
    return modes.BICUBIC if interpolation == "bicubic" else modes.BILINEAR


def _affine(degrees: float) -> list[Any]:
    if degrees == 0:
        return []
    return [
        torchvision.transforms.RandomAffine(
            degrees, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=_mode("bilinear")
        )
    ]


def _compose(steps: list[Any]) -> Transform:
    transform: Transform = torchvision.transforms.Compose(steps)
    return transform
