"""The settings of the data set and of the augmentation of its samples, as those of `schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fambav import registry
from fambav.config import checks, when
from fambav.config.setting import (
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    PROCESSES,
    RATE,
    Bounds,
    Group,
    option,
    switch,
)

INAT_LEVELS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


@dataclass(frozen=True, kw_only=True)
class Data(Group):
    """Data set and loader."""

    example: ClassVar[str] = "--data-set CIFAR --data-path /data --download --num_workers 8"

    data_set: str = option(
        "DIGITS",
        "data set; CIFAR is CIFAR-100, SHAPES100, SHAPES-SEG, SHAPES-DET and WAVES are made here",
        choices=registry.DATA_SETS,
    )
    data_path: str = option(
        "datasets",
        "folder of the data set; the file of CSV",
        when.STORED,
        affects="nothing",
        check=checks.filled,
    )
    inat_category: str = option(
        "name", "label of an INAT image", when.INATURALIST, choices=INAT_LEVELS
    )
    data_stats: str = option(
        "imagenet",
        "channel statistics to normalise by",
        when.IMAGES,
        choices=("imagenet", "own"),
    )
    download: bool = switch(
        "fetch the data set if it is missing", when.FETCHABLE, affects="nothing"
    )
    on_bad_image: str = option(
        "error",
        "skip leaves out files that are no images, 1% at most",
        when.IMAGE_FILES,
        affects="speed",
        choices=("error", "skip"),
    )
    num_workers: int = option(
        10, "loader processes", affects="speed", bounds=PROCESSES, flag="num_workers"
    )
    pin_mem: bool = switch(
        "pinned memory for batches on a GPU", on=True, affects="speed", off="no-pin-mem"
    )
    eval_crop_ratio: float = option(
        0.875,
        "center crop of an image in evaluation, as a share of its side",
        when.CLASSES,
        off_value=1.0,
        affects="model",
        bounds=Bounds(0, 1, above=True),
    )
    crop_size: int | tuple[int, int] | None = option(
        None,
        "height and width of training crops of images with masks, and of windows in evaluation; "
        "none = --input-size",
        when.MASKS,
        affects="model",
        bounds=PIXELS,
    )
    window_overlap: float = option(
        0.5,
        "share of a window's side that the next one sees too, in evaluation",
        when.MASKS,
        off_value=0.0,
        affects="model",
        bounds=RATE,
    )
    eval_scales: tuple[float, ...] = option(
        (1.0,),
        "factors that evaluation resizes images with masks by, and takes the mean over",
        when.MASKS,
        affects="model",
        bounds=Bounds(0.1, 10),
    )
    eval_flip: bool = switch(
        "take the mean over an image with a mask and its mirror image in evaluation",
        when.MASKS,
        affects="model",
    )


@dataclass(frozen=True, kw_only=True)
class Augment(Group):
    """Augmentation of training images and targets."""

    example: ClassVar[str] = "--aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0"

    color_jitter: float | None = option(
        0.3,
        "colour jitter without --aa",
        when.IMAGES,
        when.NO_POLICY,
        otherwise=None,
        off_value=0.0,
        bounds=NOT_NEGATIVE,
    )
    aa: str | None = option(
        "rand-m9-mstd0.5-inc1",
        "timm's policy, or none",
        when.CLASSES,
        when.NOT_THREE,
        otherwise=None,
        check=checks.policy,
    )
    smoothing: float = option(0.1, "label smoothing", when.CLASSES, otherwise=0.0, bounds=RATE)
    train_interpolation: str = option(
        "bicubic",
        "interpolation of resized training images",
        when.CLASSES,
        when.NOT_THREE,
        choices=("bicubic", "bilinear", "random"),
    )
    repeated_aug: bool = switch(
        "repeated augmentation: three views of an image in one epoch",
        when.CLASSES,
        on=True,
        otherwise=False,
        off="no-repeated-aug",
    )
    three_augment: bool = switch(
        "DeiT III's grey, solarise or blur instead of --aa", when.CLASSES, flag="ThreeAugment"
    )
    src: bool = switch("simple random crop, with --ThreeAugment", when.THREE)
    affine: float = option(
        0.0,
        "degrees of random rotation, with a tenth of shift and scale",
        when.CLASSES,
        when.NOT_THREE,
        bounds=Bounds(0, 180),
    )
    gpu_augment: bool = switch(
        "augment on the GPU, where a set held in memory then lives; same images",
        when.RESIDENT,
        when.ON_DEVICE,
        affects="speed",
    )
    hflip: float = option(
        0.5, "probability of a horizontal flip", when.IMAGES, otherwise=0.0, bounds=PROBABILITY
    )
    vflip: float = option(
        0.0,
        "probability of a vertical flip of an image with a mask",
        when.MASKS,
        bounds=PROBABILITY,
    )
    resize_range: tuple[float, ...] = option(
        (0.5, 2.0),
        "least and largest factor that an image with a mask is resized by, before the crop",
        when.MASKS,
        off_value=(1.0, 1.0),
        bounds=POSITIVE,
        length=2,
        check=checks.ordered,
    )
    reprob: float = option(
        0.25,
        "random erasing: probability of erasing a rectangle",
        when.CLASSES,
        when.NOT_THREE,
        otherwise=0.0,
        bounds=PROBABILITY,
    )
    remode: str = option(
        "pixel", "filling of the rectangle", when.ERASING, choices=("pixel", "rand", "const")
    )
    recount: int = option(1, "rectangles to erase", when.ERASING, bounds=Bounds(1, 100))
    mixup: float = option(
        0.8, "alpha of mixup, 0 = off", when.CLASSES, otherwise=0.0, bounds=NOT_NEGATIVE
    )
    cutmix: float = option(
        1.0,
        "alpha of cutmix, 0 = off",
        when.CLASSES,
        when.NO_SPAN,
        off_value=0.0,
        bounds=NOT_NEGATIVE,
    )
    cutmix_minmax: tuple[float, ...] | None = option(
        None,
        "least and largest side of cutmix's rectangle, as a share of the image's",
        when.CLASSES,
        bounds=PROBABILITY,
        length=2,
        check=checks.rising,
    )
    mixup_prob: float = option(
        1.0,
        "probability of mixing a batch",
        when.CLASSES,
        when.MIXING,
        off_value=0.0,
        bounds=PROBABILITY,
    )
    mixup_switch_prob: float = option(
        0.5,
        "probability of cutmix where both are on",
        when.CLASSES,
        when.MIXING,
        when.BOTH_MIXES,
        off_value=0.0,
        bounds=PROBABILITY,
    )
    mixup_mode: str = option(
        "batch", "what shares a mix", when.CLASSES, when.MIXING, choices=("batch", "pair", "elem")
    )
