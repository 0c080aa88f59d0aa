"""The data sets a run may name, and where each comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fambav.data import cifar, segments, synthetic
from fambav.data.coco import read_coco
from fambav.data.folders import read_folder, read_inat
from fambav.data.series import ETT, read_series
from fambav.data.types import ArraySet, DataError, DataSet, digest
from fambav.data.waves import waves
from fambav.registry import BUILDERS, MADE
from fambav.seeding import key

_DIGITS_HELD_OUT = 360


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `load` but the name; each builder reads those that concern it."""

    root: Path
    inat_category: str
    classes: int
    image_size: tuple[int, int]
    lookback: int
    horizon: int
    seed: int


def load(
    name: str,
    root: str | Path = "datasets",
    *,
    inat_category: str = "name",
    classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    lookback: int = 512,
    horizon: int = 96,
    seed: int = 0,
) -> DataSet:
    """Open a data set.

    Args:
        name: One of `fambav.registry.DATA_SETS`.
        root: Folder of the data, of CSV the file; those of `MADE` need none.
        inat_category: The level of the taxonomy that is iNaturalist's label.
        classes: Number of classes of FAKE.
        image_size: Height and width of FAKE's images, and of crops of VAIHINGEN and POTSDAM, in
            pixels.
        lookback: Rows of a series that a forecast is made from.
        horizon: Rows of a series that are forecast.
        seed: Seed of FAKE's images.

    Returns:
        The set.

    Raises:
        DataError: If the data is missing, damaged or of a single class, with advice.
        ValueError: If there is no set of that name.
    """
    request = Request(
        root=Path(root),
        inat_category=inat_category,
        classes=classes,
        image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
        lookback=lookback,
        horizon=horizon,
        seed=seed,
    )
    loaded: DataSet = BUILDERS[name](request)
    if loaded.num_classes < loaded.fewest:
        by = f" by {inat_category}" if name in ("INAT", "INAT19") else ""
        raise DataError(f"num_classes of {name}{by} is {loaded.num_classes}, expected at least 2")
    return loaded


def fetch(name: str, root: str | Path) -> None:
    """Download what is missing of a data set; on one process only, while the others wait.

    Args:
        name: One of `fambav.registry.DATA_SETS`; those that are made need nothing.
        root: Folder to put it in.

    Raises:
        DataError: If it can not be fetched.
    """
    if name in cifar.LAYOUTS:
        cifar.fetch(name, Path(root))
    elif name not in MADE:
        raise DataError(
            f"data_set is {name!r}, expected one that --download can fetch: "
            f"{', '.join(cifar.LAYOUTS)}; put {name} into {root} by hand"
        )


def read_digits() -> DataSet:
    """Read scikit-learn's 1,797 scanned digits of 8 x 8 pixels, 360 of them held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)  # (1797, 8, 8, 3)
    held_out = hold_out(digits.target, count=_DIGITS_HELD_OUT)
    train, val = (ArraySet(images[part], digits.target[part]) for part in (~held_out, held_out))
    sha = digest(ArraySet(images, digits.target), np.flatnonzero(held_out))
    return DataSet.in_memory(
        "DIGITS",
        train,
        val,
        class_names=tuple(map(str, range(10))),
        notes=(
            f"DIGITS: {len(train):,} images to train and {len(val):,} held out, sha256 {sha[:16]}",
        ),
        digest=sha,
    )


def hold_out(labels: NDArray[Any], *, count: int) -> NDArray[np.bool_]:
    """Choose `count` samples that show the classes in the proportion of the whole.

    The rule is our own, so that a newer library never changes it: each class gives its share
    (largest remainders first, then the lower class), taking the samples whose index has the lowest
    key.

    Args:
        labels: (samples,), integers.
        count: Number of samples to choose.

    Returns:
        (samples,), True where chosen.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count // len(labels)
    remainders = sizes * count % len(labels)
    shares[np.argsort(-remainders, kind="stable")[: count - shares.sum()]] += 1
    chosen = np.zeros(len(labels), dtype=bool)
    for label, share in zip(classes, shares, strict=True):
        indices = np.flatnonzero(labels == label)
        chosen[sorted(indices, key=lambda index: key("hold out", index))[:share]] = True
    return chosen


def _read_series(name: str, request: Request) -> DataSet:
    return read_series(name, request.root, lookback=request.lookback, horizon=request.horizon)


def _read_masks(name: str, request: Request) -> DataSet:
    return segments.READERS[name](request.root, request.image_size)


_BUILDERS: dict[str, Callable[[Request], DataSet]] = {
    "DIGITS": lambda _: read_digits(),
    "SHAPES100": lambda _: synthetic.shapes100(),
    "CIFAR": lambda request: cifar.read("CIFAR", request.root),
    "CIFAR10": lambda request: cifar.read("CIFAR10", request.root),
    "IMNET": lambda request: read_folder("IMNET", request.root),
    "FOLDER": lambda request: read_folder("FOLDER", request.root),
    "INAT": lambda request: read_inat(
        "INAT", request.root, year=2018, category=request.inat_category
    ),
    "INAT19": lambda request: read_inat(
        "INAT19", request.root, year=2019, category=request.inat_category
    ),
    "FAKE": lambda request: synthetic.fake(
        classes=request.classes, image_size=request.image_size, seed=request.seed
    ),
    "SHAPES-SEG": lambda _: synthetic.shapes_seg(),
    **{name: partial(_read_masks, name) for name in segments.READERS},
    "SHAPES-DET": lambda _: synthetic.shapes_det(),
    "COCO": lambda request: read_coco(request.root),
    "WAVES": lambda request: waves(lookback=request.lookback, horizon=request.horizon),
    **{name: partial(_read_series, name) for name in (*ETT, "CSV")},
}
for _name, _builder in _BUILDERS.items():
    BUILDERS.register(_name)(_builder)
