"""Images in folders: one folder per class, or iNaturalist's lists."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from fambav.data.arrays import IMAGENET_MEAN, IMAGENET_STD, DataError, DataSet
from fambav.timm_compat import torchvision

Folders = dict[str, list[str]]  # names of the images in each

_ENDINGS = torchvision.datasets.folder.IMG_EXTENSIONS
_SHOWN = 5  # names in a message
_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}
_BITS, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1  # TIFF's tags, and a value of the second


def read_image(path: str | Path) -> Image.Image:
    """Read one image as RGB, 8 bits a channel.

    Greyscale of 16 bits (Pillow's modes `I;16*`; `I` of a PGM, or of a PNG in older versions) is
    scaled from [0, 65535] to [0, 255] and rounded.  Other images of mode `I` and all of mode `F`
    have a range that their file does not tell, and are refused.

    Raises:
        DataError: If the file is not an image, not all of one, or one of unknown range.
    """
    try:
        with Path(path).open("rb") as file:
            image = Image.open(file)
            if _is_deep(image):
                levels = (np.asarray(image.convert("I")) * 255 + 32767) // 65535  # rounded
                return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
            if image.mode != "F" and not image.mode.startswith("I"):
                return image.convert("RGB")
            mode = f"{image.mode} ({image.format})"
    except FileNotFoundError:
        raise DataError(f"{path} is missing, expected an image") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged, expected an image ({error})") from None
    raise DataError(
        f"image {path} has mode {mode}, expected 8 bits a channel, or greyscale of 16 bits without "
        "sign in PNG, PGM, JPEG 2000 or TIFF (0 is black); save it as one of these"
    )


def _is_deep(image: Image.Image) -> bool:
    """Whether an image is greyscale whose levels are 0 to 65535 for certain."""
    if isinstance(image, TiffImageFile):
        whole = image.tag_v2.get(_BITS) == (16,)  # 12 bits have the same mode, and are not scaled
        plain = image.tag_v2.get(_PHOTOMETRIC) == _BLACK_IS_ZERO
        return image.mode.startswith("I;16") and whole and plain
    return image.mode.startswith("I") and image.format in ("PNG", "PPM", "JPEG2000")


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

    Folders in a class folder belong to the class, and links to folders are followed.

    Args:
        name: "IMNET" or "FOLDER".
        root: The folder that holds train/ and val/.

    Returns:
        The set.  Labels count the class folders in alphabetical order.  ImageNet's own statistics
        are known; those of another folder are not.

    Raises:
        DataError: If a folder is missing, empty or met twice, the classes of train and val differ,
            there is only one, or what stands in their place looks like data sets.
    """
    absent = [part for part in ("train", "val") if not (root / part).is_dir()]
    if absent:
        near = _near(root.absolute().parent, *sorted(root.glob("*")))
        raise DataError(
            f"data_path is {str(root)!r}, expected train/<class>/<image> and val/<class>/<image> "
            f"in it; missing: {', '.join(f'{root / part}/' for part in absent)}; "
            + (f"did you mean {near}?" if near else f"{name} has to be put there by hand")
        )
    train, val = _classes(root / "train"), _classes(root / "val")
    _check_depth(root / "train", train)
    other = set(train) ^ set(val)
    if other:
        raise DataError(
            f"{root}: train has {len(train)} classes and val has {len(val)}, expected "
            f"the same; only in one of them: {_few(other)}"
        )
    own = name == "IMNET"
    return DataSet(
        name=name,
        train=_labelled(train),
        val=_labelled(val),
        num_classes=len(train),
        class_names=tuple(train),
        mean=IMAGENET_MEAN if own else None,
        std=IMAGENET_STD if own else None,
    )


def _near(*places: Path) -> Path | None:
    """Return the first of some folders that holds train/<folder>/ and val/, if one is seen."""
    try:
        for at in places:
            if (at / "val").is_dir() and any(each.is_dir() for each in (at / "train").glob("*")):
                return at
    except OSError:  # no more than a hint is lost
        pass
    return None


def _classes(part: Path) -> dict[str, Folders]:
    """Return what lies in and below each class folder of `part`, in alphabetical order.

    Raises:
        DataError: If a class has no images, or a folder cannot be read or is met twice.
    """
    home = part.resolve()
    seen = {path: str(path) for path in (home, *home.parents)}
    try:
        names = sorted(entry.name for entry in part.iterdir() if entry.is_dir())
        found = {name: _folders(part / name, seen) for name in names}
    except OSError as error:
        raise DataError(f"{part} cannot be read: {error}") from None
    empty = [name for name, folders in found.items() if not folders]
    if empty or not found:
        raise DataError(
            f"{part} is incomplete: no images in {_few(empty) or 'folders of it'}, "
            f"expected <class>/<image>, one of {', '.join(_ENDINGS)}"
        )
    return found


def _folders(top: Path, seen: dict[Path, str]) -> Folders:
    """Return the folders in and below a class folder that hold images.

    Args:
        top: The class folder.
        seen: Real paths that no folder may lead to, and where they were met; added to.

    Raises:
        DataError: If one leads there, or to what holds the class folder.
        OSError: If one cannot be read.
    """
    found, above = {}, {path: str(path) for path in top.resolve().parents}
    for at, _, names in os.walk(top, followlinks=True, onerror=_refuse):
        real = Path(at).resolve()
        first = seen.get(real, above.get(real))
        if first is not None:
            raise DataError(f"{at} and {first} are one folder, expected two; remove the link")
        seen[real] = at
        found[at] = sorted(name for name in names if name.lower().endswith(_ENDINGS))
    return {at: found[at] for at in sorted(found) if found[at]}


def _refuse(error: OSError) -> NoReturn:
    """Let `os.walk` end where it would leave a folder out."""
    raise error


def _labelled(classes: dict[str, Folders]) -> ListedImages:
    return ListedImages(
        [
            (f"{at}{os.sep}{name}", label)
            for label, folders in enumerate(classes.values())
            for at, names in folders.items()
            for name in names
        ]
    )


def _check_depth(train: Path, classes: dict[str, Folders]) -> None:
    """Refuse what looks like data sets, or parts of one, in the place of classes.

    Folders in a class folder are ordinary, unless no class has images beside them and either two
    of them or more are in every class, or all are named like parts of a data set.

    Raises:
        DataError: If there is one class, or the classes look like that.
    """
    spread = [_spread(folders) for folders in classes.values()]
    inner = [names for _, names in spread]
    common, every = set.intersection(*inner), set.union(*inner)
    nested = "" not in every and (len(common) > 1 or _are_parts(every))
    if len(classes) > 1 and not nested and not _are_parts(set(classes)):
        return
    at, names = spread[0]
    near = _near(train, at)
    if near:
        hint = f"did you mean --data-path {near}?"
    elif "" in names:
        hint = "each class needs a folder of its own"
    else:
        hint = f"are {_few(names)} the classes? then move them to {train}"
    if len(classes) == 1:
        raise DataError(f"{train} has one class, {_few(classes)}, expected at least two; {hint}")
    raise DataError(
        f"{train} has {_few(classes)}, which look like data sets or parts of one, expected classes "
        f"with their images; {hint}; else move the images one folder up"
    )


def _spread(folders: Folders) -> tuple[Path, set[str]]:
    """Return the deepest folder with all images, and the names of its folders, "" for itself."""
    top = Path(os.path.commonpath(folders))
    return top, {(*Path(at).relative_to(top).parts, "")[0] for at in folders}


def _are_parts(names: set[str]) -> bool:
    return {name.lower() for name in names} <= _PARTS


def _few(names: Iterable[str]) -> str:
    """Return names as messages show them."""
    shown = sorted(names)
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")


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
