"""Images in folders: one folder per class, or iNaturalist's lists."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from fambav.arguments import near_path
from fambav.data.types import IMAGENET_MEAN, IMAGENET_STD, DataError, DataSet
from fambav.json_files import Form, check, parse
from fambav.short_repr import short_repr
from fambav.timm_compat import torchvision

Folders = dict[str, list[str]]  # names of the images in each

EXTENSIONS = torchvision.datasets.folder.IMG_EXTENSIONS
_FORMATS = ("PNG", "JPEG", "JPEG2000", "BMP", "PPM", "TIFF", "WEBP", "GIF")  # readers of Pillow
_BROKEN = (  # what they raise on files that are not whole
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_LISTED = 5  # names in a message
_READ = 2**23  # pixels of a split that are read before training begins
_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}
_IMAGES = {
    "images": [{"id": (int, str), "file_name": str}],
    "annotations": [{"image_id": (int, str), "category_id": int}],
}
_BITS, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1  # TIFF's tags, and a value of the second


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image whose format is known by the content; it is read inside the block.

    Raises:
        DataError: As `read_image`.
    """
    try:
        if not path.is_file():  # opening a FIFO would wait for whoever writes into it
            state = "no file" if path.exists() else "missing"
            state = "a folder" if path.is_dir() else state
            raise DataError(f"{path} is {state}, expected an image{near_path(path)}")
        with path.open("rb") as file:
            yield Image.open(file, formats=_FORMATS)
    except DataError:
        raise
    except UnidentifiedImageError:
        formats = ", ".join(_FORMATS)
        raise DataError(f"{path} is of no known format, expected an image in {formats}") from None
    except _BROKEN as error:
        raise DataError(f"{path} is damaged, expected an image ({error})") from None


def read_some(count: int, read: Callable[[int], int]) -> None:
    """Read samples from all over a set, until their images have 2^23 pixels.

    Files that do not fit together are mostly many; they are thus refused before a run begins, and a
    large set costs about a second.

    Args:
        count: Of the samples.
        read: Reads one by its index, and returns the number of its pixels.
    """
    seen = 0
    # Multiples of the golden ratio, without their whole parts, are spread evenly.
    for index in sorted(range(count), key=lambda n: n * 0.6180339887 % 1):
        seen += read(index)
        if seen >= _READ:
            return


def read_image(path: str | Path) -> Image.Image:
    """Read one image as RGB, 8 bits a channel.

    The format is known by the content: PNG, JPEG, JPEG 2000, BMP, PPM, TIFF, WebP or GIF.

    Greyscale of 16 bits (Pillow's modes `I;16*`; `I` of a PGM, or of a PNG in older versions) is
    scaled from [0, 65535] to [0, 255] and rounded.  Other images of mode `I` and all of mode `F`
    have an unknown range, and are refused.

    Raises:
        DataError: If the file is not an image in one of these formats, not all of one, or one of
            unknown range.
    """
    with open_image(Path(path)) as image:
        return _rgb(image, Path(path))


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if _is_16_bit(image):
        levels = (np.asarray(image.convert("I")) * 255 + 32767) // 65535  # rounded
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    raise DataError(
        f"image {path} has mode {image.mode} ({image.format}), expected 8 bits a channel, or "
        "greyscale of 16 bits without sign in PNG, PGM, JPEG 2000 or TIFF (0 is black); save it as "
        "one of these"
    )


def _is_16_bit(image: Image.Image) -> bool:
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

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return self.entries[index][0]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.entries[index]
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
            there is only one, or data sets stand in the place of classes.
    """
    missing = [part for part in ("train", "val") if not (root / part).is_dir()]
    if missing:
        near = _data_set_in(root.absolute().parent, *sorted(root.glob("*")))
        raise DataError(
            f"data_path is {str(root)!r}, expected train/<class>/<image> and val/<class>/<image> "
            f"in it; missing: {', '.join(f'{root / part}/' for part in missing)}; "
            + (f"did you mean {near}?" if near else f"{name} has to be put there by hand")
        )
    train, val = _classes(root / "train"), _classes(root / "val")
    _check_depth(root / "train", train)
    unmatched = set(train) ^ set(val)
    if unmatched:
        raise DataError(
            f"{root}: train has {len(train)} classes and val has {len(val)}, expected "
            f"the same; only in one of them: {_listed(unmatched)}"
        )
    imagenet = name == "IMNET"
    return DataSet(
        name=name,
        train=_labelled(train),
        val=_labelled(val),
        num_classes=len(train),
        class_names=tuple(train),
        mean=IMAGENET_MEAN if imagenet else None,
        std=IMAGENET_STD if imagenet else None,
    )


def _data_set_in(*folders: Path) -> Path | None:
    """Return the first of some folders that holds train/<folder>/ and val/, or None."""
    try:
        for folder in folders:
            subfolders = (folder / "train").glob("*")
            if (folder / "val").is_dir() and any(each.is_dir() for each in subfolders):
                return folder
    except OSError:  # no more than a hint is lost
        pass
    return None


def _classes(part: Path) -> dict[str, Folders]:
    """Return the images in and below each class folder of `part`, in alphabetical order.

    Raises:
        DataError: If a class has no images, or a folder cannot be read or is met twice.
    """
    home = part.resolve()
    seen = {path: str(path) for path in (home, *home.parents)}
    try:
        names = sorted(entry.name for entry in part.iterdir() if entry.is_dir())
        classes = {name: _folders(part / name, seen) for name in names}
    except OSError as error:
        raise DataError(f"{part} cannot be read: {error}") from None
    empty = [name for name, folders in classes.items() if not folders]
    if empty or not classes:
        raise DataError(
            f"{part} is incomplete: no images in {_listed(empty) or 'folders of it'}, "
            f"expected <class>/<image>, one of {', '.join(EXTENSIONS)}"
        )
    return classes


def _folders(top: Path, seen: dict[Path, str]) -> Folders:
    """Return the folders in and below a class folder that hold images.

    Args:
        top: The class folder.
        seen: Real paths that no folder may lead to, and where they were met; added to.

    Raises:
        DataError: If one leads there, or to a folder that holds the class folder.
        OSError: If one cannot be read.
    """
    images, above = {}, {path: str(path) for path in top.resolve().parents}
    for folder, _, names in os.walk(top, followlinks=True, onerror=_raise):
        real = Path(folder).resolve()
        first = seen.get(real, above.get(real))
        if first is not None:
            raise DataError(f"{folder} and {first} are one folder, expected two; remove the link")
        seen[real] = folder
        images[folder] = sorted(name for name in names if name.lower().endswith(EXTENSIONS))
    return {folder: images[folder] for folder in sorted(images) if images[folder]}


def _raise(error: OSError) -> NoReturn:
    """Let `os.walk` end where it would leave a folder out."""
    raise error


def _labelled(classes: dict[str, Folders]) -> ListedImages:
    return ListedImages(
        [
            (f"{folder}{os.sep}{name}", label)
            for label, folders in enumerate(classes.values())
            for folder, names in folders.items()
            for name in names
        ]
    )


def _check_depth(train: Path, classes: dict[str, Folders]) -> None:
    """Refuse data sets, or parts of one, in the place of classes.

    Folders in a class folder are ordinary, unless no class has images beside them and either two
    of them or more are in every class, or all are named like parts of a data set.

    Raises:
        DataError: If there is one class, or the classes are like that.
    """
    tops = [Path(os.path.commonpath(folders)) for folders in classes.values()]
    inner = [  # for each class, the folders in its topmost one with images, "" for itself
        {(*Path(folder).relative_to(top).parts, "")[0] for folder in folders}
        for top, folders in zip(tops, classes.values(), strict=True)
    ]
    common, every = set.intersection(*inner), set.union(*inner)
    nested = "" not in every and (len(common) > 1 or _are_parts(every))
    if len(classes) > 1 and not nested and not _are_parts(classes):
        return
    near = _data_set_in(train, tops[0])
    if near:
        hint = f"did you mean --data-path {near}?"
    elif "" in inner[0]:
        hint = "each class needs a folder of its own"
    else:
        hint = f"are {_listed(inner[0])} the classes? then move them to {train}"
    if len(classes) == 1:
        raise DataError(f"{train} has one class, {_listed(classes)}, expected at least two; {hint}")
    raise DataError(
        f"{train} has {_listed(classes)}, which look like data sets or parts of one, expected "
        f"classes with their images; {hint}; else move the images one folder up"
    )


def _are_parts(names: Iterable[str]) -> bool:
    return {name.lower() for name in names} <= _PARTS


def _listed(names: Iterable[str]) -> str:
    """Return names as messages show them."""
    ordered = sorted(names)
    return ", ".join(ordered[:_LISTED]) + (", ..." if len(ordered) > _LISTED else "")


def read_inat(name: str, root: Path, *, year: int, category: str) -> DataSet:
    """Read iNaturalist from its lists, as DeiT does.

    train<year>.json and val<year>.json list images and their categories, categories.json describes
    the categories.  Labels count the values of `category` in the order in which the training list
    first shows them, so that heads trained elsewhere keep their meaning.

    Args:
        name: "INAT" or "INAT19".
        root: The folder that holds the three lists and the folders of images.
        year: 2018 or 2019.
        category: The label: name, genus, family, order, class, phylum, kingdom or supercategory.

    Raises:
        DataError: If a list is missing or damaged, or does not know `category`.
    """
    lists = (f"train{year}.json", f"val{year}.json", "categories.json")
    missing = [file for file in lists if not (root / file).is_file()]
    if missing:
        raise DataError(
            f"data_path is {str(root)!r}, expected {', '.join(lists)} and the images in it; "
            f"missing: {', '.join(missing)}; {name} has to be put there by hand"
        )
    train, val = (_read_list(root / file, _IMAGES) for file in lists[:2])
    names = _category_names(root / lists[2], category)
    labels: dict[str, int] = {}
    kinds = [
        _image_names(root / file, part, names)
        for file, part in zip(lists, (train, val), strict=False)
    ]
    for annotation in train["annotations"]:
        labels.setdefault(names[annotation["category_id"]], len(labels))
    sets = [
        _inat_images(root, part["images"], own, labels)
        for part, own in zip((train, val), kinds, strict=True)
    ]
    return DataSet(
        name=name,
        train=sets[0],
        val=sets[1],
        num_classes=len(labels),
        class_names=tuple(labels),
    )


def _read_list(path: Path, form: Form) -> Any:
    try:
        value = parse(path.read_bytes(), path, "iNaturalist's list")
        check(value, form, path)
    except ValueError as error:
        raise DataError(str(error)) from None
    return value


def _category_names(path: Path, category: str) -> dict[int, str]:
    """Return the name of each category id at the level of `category`; a number becomes text."""
    categories = _read_list(path, [dict])
    if not categories:
        raise DataError(f"{path} lists no categories, expected two at least")
    levels = sorted(set(categories[0]) - {"id"})
    if category not in levels:
        raise DataError(f"inat_category is {category!r}, expected one of {', '.join(levels)}")
    names = {}
    for index, entry in enumerate(categories):
        number, name = entry.get("id", index), entry.get(category)
        if type(number) is not int or type(name) not in (str, int, float):
            raise DataError(
                f"{path}: entry {index} has id {short_repr(number)} and {category}"
                f" {short_repr(name)}, expected a whole number and a name"
            )
        names[number] = str(name)
    return names


def _image_names(path: Path, part: Any, names: dict[int, str]) -> list[str]:
    """Return the name of each image's category, in the order of the images."""
    if not part["images"]:
        raise DataError(f"{path} lists no images, expected one at least")
    names_of = {}
    for annotation in part["annotations"]:
        number = annotation["category_id"]
        if number not in names:
            raise DataError(f"{path}: category_id is {number}, expected one of categories.json")
        names_of[annotation["image_id"]] = names[number]
    for image in part["images"]:
        file = image["file_name"]
        if image["id"] not in names_of:
            raise DataError(
                f"{path}: image {short_repr(image['id'])} has no annotation, expected one"
            )
        if "\0" in file or file.startswith("/") or ".." in file.split("/"):
            raise DataError(
                f"{path}: file_name is {short_repr(file)}, expected a path in the list's folder"
            )
    return [names_of[image["id"]] for image in part["images"]]


def _inat_images(
    root: Path, images: list[Any], names: list[str], labels: dict[str, int]
) -> ListedImages:
    first = images[0]["file_name"].split("/")
    # DeiT expects folders without the kingdom that the list names.
    short = len(first) == 4 and root.joinpath(first[0], *first[2:]).is_file()
    entries = []
    for image, name in zip(images, names, strict=True):
        if name not in labels:
            raise DataError(
                f"{root}: {short_repr(name)} is only in the validation list, expected in both"
            )
        parts = image["file_name"].split("/")
        entries.append((str(root.joinpath(parts[0], *parts[2 if short else 1 :])), labels[name]))
    return ListedImages(entries)
