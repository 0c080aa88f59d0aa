"""Images in folders: one folder per class, or iNaturalist's lists."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from PIL import Image

from fambav.data.arrays import IMAGENET_MEAN, IMAGENET_STD, DataError, DataSet
from fambav.ecosystem import torchvision


def read_image(path: str | Path) -> Image.Image:
    """Read one image as RGB.

    Raises:
        DataError: If the file is not an image, or not all of one.
    """
    try:
        with Path(path).open("rb") as file:
            return Image.open(file).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path} is missing, expected an image") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged, expected an image ({error})") from None


class ListedImages:
    """Images by path.

    Args:
        entries: Path and label of each.
    """

    def __init__(self, entries: list[tuple[str, int]]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        path, label = self.entries[place]
        return read_image(path), label


def read_folder(name: str, root: Path) -> DataSet:
    """Read `root`/train and `root`/val with one folder per class, as ImageNet is laid out.

    Args:
        name: "IMNET" or "FOLDER".
        root: The folder that holds train/ and val/.

    Returns:
        The set.  Labels count the class folders in alphabetical order.  ImageNet's own statistics
        are known; those of another folder are not.

    Raises:
        DataError: If a folder is missing or empty, or the classes of train and val differ.
    """
    absent = [part for part in ("train", "val") if not (root / part).is_dir()]
    if absent:
        raise DataError(
            f"data_path is {str(root)!r}, expected train/<class>/<image> and val/<class>/<image> "
            f"in it; missing: {', '.join(f'{root / part}/' for part in absent)}; "
            f"{name} has to be put there by hand"
        )
    sets, classes = [], []
    for part in ("train", "val"):
        try:
            found = torchvision.datasets.ImageFolder(str(root / part))
        except FileNotFoundError as error:
            raise DataError(f"{root / part} is incomplete: {error}") from None
        sets.append(ListedImages(found.samples))
        classes.append(found.classes)
    other = sorted(set(classes[0]) ^ set(classes[1]))
    if other:
        raise DataError(
            f"{root}: train has {len(classes[0])} classes and val has {len(classes[1])}, expected "
            f"the same; only in one of them: {', '.join(other[:5])}"
        )
    own = name == "IMNET"
    return DataSet(
        name=name,
        train=sets[0],
        val=sets[1],
        num_classes=len(classes[0]),
        class_names=tuple(classes[0]),
        mean=IMAGENET_MEAN if own else None,
        std=IMAGENET_STD if own else None,
    )


def read_inat(name: str, root: Path, *, year: int, category: str) -> DataSet:
    """Read iNaturalist from its lists, as DeiT does.

    train<year>.json and val<year>.json list images and their categories, categories.json says what
    a category is.  Labels count the values of `category` in the order in which the training list
    first shows them, so that heads trained elsewhere keep their meaning.

    Args:
        name: "INAT" or "INAT19".
        root: The folder that holds the three lists and the folders of images.
        year: 2018 or 2019.
        category: What to tell apart: name, genus, family, order, class, phylum, kingdom or
            supercategory.

    Returns:
        The set.

    Raises:
        DataError: If a list is missing or damaged, or does not know `category`.
    """
    lists = (f"train{year}.json", f"val{year}.json", "categories.json")
    absent = [file for file in lists if not (root / file).is_file()]
    if absent:
        raise DataError(
            f"data_path is {str(root)!r}, expected {', '.join(lists)} and the images in it; "
            f"missing: {', '.join(absent)}; {name} has to be put there by hand"
        )
    train, val, categories = (_json(root / file) for file in lists)
    try:
        values = _values(categories, category)
        labels: dict[str, int] = {}
        for annotation in train["annotations"]:
            labels.setdefault(values[int(annotation["category_id"])], len(labels))
        sets = [_listed(root, part, values, labels) for part in (train, val)]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{root}: {', '.join(lists)} do not fit together, expected iNaturalist's lists of "
            f"{year} ({type(error).__name__}: {error})"
        ) from None
    return DataSet(
        name=name,
        train=sets[0],
        val=sets[1],
        num_classes=len(labels),
        class_names=tuple(labels),
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is truncated or damaged, expected JSON ({error})") from None


def _values(categories: Any, category: str) -> dict[int, str]:
    """Return what each category id is called at the level of `category`."""
    known = sorted(set(categories[0]) - {"id"})
    if category not in known:
        raise DataError(f"inat_category is {category!r}, expected one of {', '.join(known)}")
    return {int(entry.get("id", place)): entry[category] for place, entry in enumerate(categories)}


def _listed(root: Path, part: Any, values: dict[int, str], labels: dict[str, int]) -> ListedImages:
    short = _shortened(root, part["images"])
    category_of = {entry["image_id"]: int(entry["category_id"]) for entry in part["annotations"]}
    entries = []
    for image in part["images"]:
        value = values[category_of[image["id"]]]
        if value not in labels:
            raise DataError(f"{root}: {value!r} is only in the validation list, expected in both")
        parts = image["file_name"].split("/")
        entries.append((str(root.joinpath(parts[0], *parts[2 if short else 1 :])), labels[value]))
    return ListedImages(entries)


def _shortened(root: Path, images: Any) -> bool:
    """Return whether the folders lack the kingdom that the list names, as DeiT expects them."""
    parts = images[0]["file_name"].split("/") if images else []
    return len(parts) == 4 and root.joinpath(parts[0], *parts[2:]).is_file()
