"""Data sets of images with masks: folders with a palette, the ISPRS benchmarks, ADE20K."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL import Image

from fambav.data.folders import EXTENSIONS, open_image, read_image, read_some
from fambav.data.palette import Palette, read_palette
from fambav.data.types import DataError, DataSet

_CACHED = 4  # decoded images that a process keeps, of which windows are cut
_LISTED = 5  # names in a message


class Entry(NamedTuple):
    """Where an image and its mask are; `box` is left, top, right, bottom of a window of both."""

    image: str
    mask: str
    box: tuple[int, int, int, int] | None = None


class ListedMasks:
    """Images and masks by path.

    Args:
        entries: Where they are.
        palette: What the pixels of masks mean.
    """

    def __init__(self, entries: Sequence[Entry], palette: Palette) -> None:
        self.entries, self.palette = entries, palette
        self._decoded = lru_cache(_CACHED)(self._decode)

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": self.entries, "palette": self.palette}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a cache is not sent to another process

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return self.entries[index].image

    def __getitem__(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        """Return an image in RGB, and the labels of its pixels, (height, width), uint8.

        Raises:
            DataError: If one cannot be read, or they differ in size.
        """
        entry = self.entries[index]
        if entry.box is None:
            return self._decode(entry.image, entry.mask)
        image, labels = self._decoded(entry.image, entry.mask)
        left, top, right, bottom = entry.box
        return image.crop(entry.box), labels[top:bottom, left:right]

    def check(self) -> None:
        """Read some images and masks, by `fambav.data.folders.read_some`.

        Raises:
            DataError: As indexing.
        """
        files = list(dict.fromkeys((entry.image, entry.mask) for entry in self.entries))
        read_some(len(files), lambda n: self._decode(*files[n])[1].size)

    def _decode(self, image: str, mask: str) -> tuple[Image.Image, NDArray[Any]]:
        pixels, labels = read_image(image), self.palette.read(mask)
        _check_sizes(image, pixels.size, mask, labels.shape[::-1])
        return pixels, labels


def _check_sizes(image: str, size: tuple[int, ...], mask: str, other: tuple[int, ...]) -> None:
    if size != other:
        width, height = size
        raise DataError(
            f"{mask} is {other[0]} x {other[1]}, expected {width} x {height} as {image}"
        )


def _size(path: str) -> tuple[int, int]:
    """Return width and height of an image, from its head alone."""
    with open_image(Path(path)) as image:
        return image.size


def _windows(entries: Sequence[Entry], side: tuple[int, int]) -> Iterator[Entry]:
    """Yield windows of a height and a width that cover each image; the last ones overlap."""
    for entry in entries:
        width, height = _size(entry.image)
        tall, wide = min(side[0], height), min(side[1], width)
        for top in [*range(0, height - tall, tall), height - tall]:
            for left in [*range(0, width - wide, wide), width - wide]:
                yield entry._replace(box=(left, top, left + wide, top + tall))


def read_masks(root: Path) -> DataSet:
    """Read images/{train,val}/NAME and masks/{train,val}/NAME beside palette.yaml.

    A mask has the name of its image, whatever their endings.  palette.yaml is what
    `fambav.data.palette.read_palette` reads, and may name other folders, such as those of GID-15.

    Raises:
        DataError: If a folder, a file or a mask is missing.  No image is opened: one that cannot be
            read, or whose mask has another size, is refused when it is read.
    """
    palette, names = read_palette(root / "palette.yaml")
    parts = [
        _matched(root / names["images"] / part, root / names["masks"] / part, names["mask_suffix"])
        for part in ("train", "val")
    ]
    train, val = (ListedMasks(part, palette) for part in parts)
    return _data_set("SEGFOLDER", train, val)


def _matched(images: Path, masks: Path, suffix: str) -> list[Entry]:
    """Pair the images of a folder with the masks of another by their names."""
    own, others = _files(images), _files(masks)
    if not own:
        raise DataError(f"{images} has no images, expected one of {', '.join(EXTENSIONS)}")
    _refuse_missing(masks, [f"{name}{suffix}" for name in own if f"{name}{suffix}" not in others])
    unused = others.keys() - {f"{name}{suffix}" for name in own}
    if unused:
        name = min(unused)
        raise DataError(f"{others[name]} has no image in {images}, expected one for each mask")
    return [Entry(path, others[f"{name}{suffix}"]) for name, path in own.items()]


def _files(folder: Path) -> dict[str, str]:
    """Return the images of a folder by their names without endings, in order."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing, expected a folder of images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    return {path.stem: str(path) for path in paths}


def _refuse_missing(folder: Path, names: Sequence[str]) -> None:
    if names:
        more = ", ..." if len(names) > _LISTED else ""
        raise DataError(
            f"{folder} lacks {len(names)}, expected each: {', '.join(names[:_LISTED])}{more}"
        )


def _data_set(name: str, train: ListedMasks, val: ListedMasks, **more: Any) -> DataSet:
    names = train.palette.names
    return DataSet(
        name=name,
        train=train,
        val=val,
        num_classes=len(names),
        class_names=names,
        uniform=False,
        **more,
    )


_ISPRS = Palette.of(
    {
        "impervious surfaces": "#ffffff",
        "building": "#0000ff",
        "low vegetation": "#00ffff",
        "tree": "#00ff00",
        "car": "#ffff00",
        "clutter": "#ff0000",
    },
    ignore=["#000000"],  # the eroded borders
    unknown="ignore",  # a few pixels of published masks are of other colours
)
_CLUTTER = 5


class Tiles(NamedTuple):
    """How an ISPRS benchmark is laid out; {} stands for a tile of the splits."""

    image: str
    mask: str
    eroded: str
    train: str
    test: str


_AREA = "top_mosaic_09cm_area{}"
_TILE = "top_potsdam_{}"
LAYOUTS = {
    "VAIHINGEN": Tiles(
        image=f"top/{_AREA}.tif",
        mask=f"gts_for_participants/{_AREA}.tif",
        eroded=f"gts_eroded_for_participants/{_AREA}_noBoundary.tif",
        train="1 3 23 26 7 11 13 28 17 32 34 37",
        test="5 21 15 30",
    ),
    "POTSDAM": Tiles(
        image=f"2_Ortho_RGB/{_TILE}_RGB.tif",
        mask=f"5_Labels_all/{_TILE}_label.tif",
        eroded=f"5_Labels_all_noBoundary/{_TILE}_label_noBoundary.tif",
        train=(
            "2_10 2_11 2_12 3_10 3_11 3_12 4_10 4_11 4_12 5_10 5_11 5_12 6_7 6_8 6_9"
            " 6_10 6_11 6_12 7_7 7_8 7_9 7_11 7_12"
        ),
        test="2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13",
    ),
}


def read_isprs(name: str, root: Path, *, crop: tuple[int, int]) -> DataSet:
    """Read the tiles of Vaihingen or Potsdam as they are distributed.

    Training samples are windows twice as large as a crop, which cover each tile.  Whole tiles are
    held out, with the eroded masks, whose borders between classes do not count; without that
    folder, with the full ones.  Clutter is a class that models learn and means leave out.

    Args:
        name: "VAIHINGEN" or "POTSDAM".
        root: The folder that holds those of images and masks.
        crop: Height and width of a training crop, in pixels.

    Raises:
        DataError: If a tile of a split is missing, or a training tile cannot be read: the size of
            each is needed to cut it.  Masks are compared with their images when they are read.

    Source: the 2-D semantic labelling contest of ISPRS; the splits are those of CVMH-UNet and, for
    Potsdam, of the contest without tile 7_10, whose labels are wrong.
    """
    layout = LAYOUTS[name]
    eroded = (root / layout.eroded).parent
    held_out = layout.eroded if eroded.is_dir() else layout.mask
    train = _tiles(root, layout.image, layout.mask, layout.train.split())
    test = _tiles(root, layout.image, held_out, layout.test.split())
    windows = list(_windows(train, (2 * crop[0], 2 * crop[1])))
    kind = "eroded" if eroded.is_dir() else "full"
    note = (
        f"{name}: {len(windows)} windows of {len(train)} tiles to train, {len(test)} tiles held out"
        f" with {kind} masks; clutter is not in the means"
    )
    samples = (ListedMasks(entries, _ISPRS) for entries in (windows, test))
    return _data_set(name, *samples, notes=(note,), unscored=(_CLUTTER,))


def _tiles(root: Path, image: str, mask: str, names: Sequence[str]) -> list[Entry]:
    """Return the tiles of a split; both paths have {} for the name of a tile."""
    for form in (image, mask):
        missing = [name for name in names if not (root / form.format(name)).is_file()]
        _refuse_missing((root / form).parent, [Path(form.format(name)).name for name in missing])
    return [Entry(str(root / image.format(name)), str(root / mask.format(name))) for name in names]


def read_ade20k(root: Path) -> DataSet:
    """Read images/{training,validation} and annotations/{training,validation} of ADE20K.

    Index 0 of a mask is no class; indices 1 to 150 are labels 0 to 149, whose names are in
    objectInfo150.txt if it is there.

    Args:
        root: ADEChallengeData2016, or the folder that holds it.

    Raises:
        DataError: As `read_masks`.
    """
    inner = root / "ADEChallengeData2016"
    root = inner if inner.is_dir() else root
    palette = Palette.of({name: n for n, name in enumerate(_ade_names(root), start=1)}, ignore=[0])
    train, val = (
        ListedMasks(_matched(root / "images" / part, root / "annotations" / part, ""), palette)
        for part in ("training", "validation")
    )
    return _data_set("ADE20K", train, val)


def _ade_names(root: Path) -> list[str]:
    """Return the first name of each class, with its number if it is not the only one of that."""
    path, classes = root / "objectInfo150.txt", range(1, 151)
    if not path.is_file():
        return [f"class {number}" for number in classes]
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if len(names) != len(classes):
        raise DataError(f"{path} has {len(names)} classes, expected {len(classes)}")
    return [n if names.count(n) == 1 else f"{n} {k}" for k, n in enumerate(names, start=1)]


READERS: dict[str, Callable[..., DataSet]] = {
    "SEGFOLDER": lambda root, crop: read_masks(root),
    "ADE20K": lambda root, crop: read_ade20k(root),
    "VAIHINGEN": lambda root, crop: read_isprs("VAIHINGEN", root, crop=crop),
    "POTSDAM": lambda root, crop: read_isprs("POTSDAM", root, crop=crop),
}
