"""The data sets a run may name, and where each comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fambav.data import cifar, shapes
from fambav.data.arrays import ArraySet, DataError, DataSet, digest
from fambav.data.folders import read_folder, read_inat
from fambav.registry import BUILDERS
from fambav.seeding import key

_DIGITS_HELD_OUT = 360
_FAKE_COUNTS = (1280, 256)
_UNIFORM = 12**-0.5  # standard deviation of a number drawn evenly from [0, 1]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `load` was asked for; a builder takes what concerns it."""

    root: Path
    inat_category: str
    classes: int
    image_size: tuple[int, int]
    seed: int


def load(
    name: str,
    root: str | Path = "datasets",
    *,
    inat_category: str = "name",
    classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    seed: int = 0,
) -> DataSet:
    """Open a data set.

    Args:
        name: One of `fambav.registry.DATA_SETS`.
        root: Folder of the data; DIGITS, SHAPES100 and FAKE need none.
        inat_category: What iNaturalist's labels tell apart.
        classes: Number of classes of FAKE.
        image_size: Height and width of FAKE's images, in pixels.
        seed: Seed of FAKE's images.

    Returns:
        The set.

    Raises:
        DataError: If the data is missing, damaged or of a single class; the message says what to
            do.
        ValueError: If there is no set of that name.
    """
    builder = BUILDERS[name]
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    found: DataSet = builder(
        Request(
            root=Path(root),
            inat_category=inat_category,
            classes=classes,
            image_size=size,
            seed=seed,
        )
    )
    if found.num_classes < 2:
        by = f" by {inat_category}" if name in ("INAT", "INAT19") else ""
        raise DataError(f"num_classes of {name}{by} is {found.num_classes}, expected at least 2")
    return found


def fetch(name: str, root: str | Path) -> None:
    """Fetch what is missing of a data set; on one process only, while the others wait.

    Args:
        name: One of `fambav.registry.DATA_SETS`; DIGITS, SHAPES100 and FAKE need nothing.
        root: Folder to put it in.

    Raises:
        DataError: If it can not be fetched.
    """
    if name in cifar.LAYOUTS:
        cifar.fetch(name, Path(root))
    elif name not in ("DIGITS", "SHAPES100", "FAKE"):
        raise DataError(
            f"data_set is {name!r}, expected one that --download can fetch: "
            f"{', '.join(cifar.LAYOUTS)}; put {name} into {root} by hand"
        )


@BUILDERS.register("DIGITS")
def _digits(_: Request) -> DataSet:
    """Scikit-learn's 1,797 scanned digits of 8 x 8 pixels, 360 of them held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    held_out = hold_out(found.target, count=_DIGITS_HELD_OUT)
    train, val = (ArraySet(images[part], found.target[part]) for part in (~held_out, held_out))
    mean, std = train.statistics()
    sha = digest(ArraySet(images, found.target), np.flatnonzero(held_out))
    return DataSet(
        name="DIGITS",
        train=train,
        val=val,
        num_classes=10,
        class_names=tuple(map(str, range(10))),
        mean=mean,
        std=std,
        notes=(
            f"DIGITS: {len(train):,} images to train and {len(val):,} held out, sha256 {sha[:16]}",
        ),
        digest=sha,
    )


def hold_out(labels: NDArray[Any], *, count: int) -> NDArray[np.bool_]:
    """Choose `count` samples that show the classes in the proportion of the whole.

    The rule is our own, so that a newer library never changes it: each class gives its share
    (largest remainders first, then the lower class), taking the samples whose place has the lowest
    key.

    Args:
        labels: (samples,), integers.
        count: How many to choose.

    Returns:
        (samples,), True where chosen.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count // len(labels)
    remainders = sizes * count % len(labels)
    shares[np.argsort(-remainders, kind="stable")[: count - shares.sum()]] += 1
    chosen = np.zeros(len(labels), dtype=bool)
    for label, share in zip(classes, shares, strict=True):
        places = np.flatnonzero(labels == label)
        chosen[sorted(places, key=lambda place: key("hold out", place))[:share]] = True
    return chosen


@BUILDERS.register("SHAPES100")
def _shapes100(_: Request) -> DataSet:
    return shapes.read()


@BUILDERS.register("CIFAR")
def _cifar100(request: Request) -> DataSet:
    return cifar.read("CIFAR", request.root)


@BUILDERS.register("CIFAR10")
def _cifar10(request: Request) -> DataSet:
    return cifar.read("CIFAR10", request.root)


@BUILDERS.register("IMNET")
def _imagenet(request: Request) -> DataSet:
    return read_folder("IMNET", request.root)


@BUILDERS.register("FOLDER")
def _folder(request: Request) -> DataSet:
    return read_folder("FOLDER", request.root)


@BUILDERS.register("INAT")
def _inat(request: Request) -> DataSet:
    return read_inat("INAT", request.root, year=2018, category=request.inat_category)


@BUILDERS.register("INAT19")
def _inat19(request: Request) -> DataSet:
    return read_inat("INAT19", request.root, year=2019, category=request.inat_category)


class FakeImages:
    """Noise, each image a function of seed, part and place; labels go round the classes.

    Args:
        part: Keeps the images of training and validation apart.
        count: Number of images.
        classes: Number of classes.
        image_size: Height and width, in pixels.
        seed: Seed of the set.
    """

    def __init__(
        self, part: str, *, count: int, classes: int, image_size: tuple[int, int], seed: int
    ) -> None:
        self.part, self.count, self.classes = part, count, classes
        self.image_size, self.seed = image_size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        source = torch.Generator().manual_seed(key(self.seed, "fake", self.part, place))
        pixels = torch.randint(256, (*self.image_size, 3), generator=source, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy()), place % self.classes


@BUILDERS.register("FAKE")
def _fake(request: Request) -> DataSet:
    options: dict[str, Any] = {
        "classes": request.classes,
        "image_size": request.image_size,
        "seed": request.seed,
    }
    return DataSet(
        name="FAKE",
        train=FakeImages("train", count=_FAKE_COUNTS[0], **options),
        val=FakeImages("val", count=_FAKE_COUNTS[1], **options),
        num_classes=request.classes,
        mean=(0.5, 0.5, 0.5),
        std=(_UNIFORM, _UNIFORM, _UNIFORM),
    )
