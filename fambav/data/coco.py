"""Data sets in the layout of COCO: annotations/instances_*.json and folders of images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fambav.arguments import is_number, is_whole
from fambav.data.folders import read_image, read_some
from fambav.data.instances import Instances
from fambav.data.types import DataError, DataSet
from fambav.json_files import read_object
from fambav.short_repr import short_repr

_FORM = {
    "images": [{"id": int, "file_name": str, "width": int, "height": int}],
    "annotations": [{"id": int, "image_id": int, "category_id": int, "bbox": [float]}],
    "categories": [{"id": int, "name": str}],
}
_SLACK = 1  # pixels by which rounding may put a box outside; it is cut off there


class Entry(NamedTuple):
    """An image and what is known of it; `outlines` are polygons, (points, 2), or runs."""

    path: str
    size: tuple[int, int]  # width and height
    ids: tuple[int, ...]  # of the annotations
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    outlines: tuple[Any, ...]


class ListedInstances:
    """Images by path, with their objects.

    Args:
        entries: What is known of each.
        source: The file that it is known from.
    """

    def __init__(self, entries: Sequence[Entry], source: Path) -> None:
        self.entries, self.source = entries, source

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return self.entries[index].path

    def check(self) -> None:
        """Read some images, by `fambav.data.folders.read_some`.

        Raises:
            DataError: As indexing.
        """
        read_some(len(self), lambda n: math.prod(self[n][0].size))

    def __getitem__(self, index: int) -> tuple[Image.Image, Instances]:
        """Return an image in RGB, and its objects.

        Raises:
            DataError: If it cannot be read, or has another size than its annotations say.
        """
        entry = self.entries[index]
        image = read_image(entry.path)
        if image.size != entry.size:
            width, height = entry.size
            raise DataError(
                f"{entry.path} is {image.width} x {image.height}, expected {width} x {height} as in"
                f" {self.source}"
            )
        return image, Instances(entry.boxes, entry.labels, entry.crowd, lambda: self._masks(entry))

    def _masks(self, entry: Entry) -> NDArray[np.bool_]:
        masks = np.zeros((len(entry.ids), entry.size[1], entry.size[0]), dtype=bool)
        for mask, outline, number in zip(masks, entry.outlines, entry.ids, strict=True):
            if outline is None:
                raise DataError(
                    f"{self.source}: annotation {number} has no segmentation, expected one for its"
                    " mask"
                )
            mask[:] = rasterised(outline, entry.size)
        return masks


def rasterised(outline: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels inside of an outline, (height, width).

    Args:
        outline: Polygons, (points, 2) each, in pixels; or lengths of runs, (runs,), which are
            outside and inside in turn, down each column, the left one first.
        size: Width and height.
    """
    width, height = size
    if isinstance(outline, np.ndarray):
        inside = np.repeat(np.arange(len(outline)) % 2 == 1, outline).reshape(width, height)
        runs: NDArray[np.bool_] = inside.T
        return runs
    picture = Image.new("1", size)
    pen = ImageDraw.Draw(picture)
    for polygon in outline:
        pen.polygon([(float(x) - 0.5, float(y) - 0.5) for x, y in polygon], fill=1)
    filled: NDArray[np.bool_] = np.asarray(picture)
    return filled


def read_coco(root: Path) -> DataSet:
    """Read annotations/instances_{train,val}*.json and the images in the folders of their names.

    Images of instances_train2017.json are in train2017 or images/train2017.  Labels are in the
    order of the categories' ids.  Training leaves out images without a box that could teach.

    Args:
        root: The folder that holds those.

    Raises:
        DataError: If a file is missing or has another form, a box lies outside of its image, or an
            annotation is of no image or category.  Images are opened when they are read.
    """
    files = [_annotations(root, part) for part in ("train", "val")]
    contents = [_read(file) for file in files]
    first, second = (_categories(c, file) for c, file in zip(contents, files, strict=True))
    if first != second:
        raise DataError(f"{files[1]} has other categories than {files[0]}, expected the same")
    (train, lost), (val, lost_too) = (
        _entries(content, file, {number: label for label, number in enumerate(first)})
        for content, file in zip(contents, files, strict=True)
    )
    teaching = [entry for entry in train if not entry.crowd.all()]
    if not teaching:
        raise DataError(f"{files[0]} has no annotations that teach, expected boxes of images")
    empty = len(train) - len(teaching)
    note = (
        f"COCO: {len(teaching):,} images to train, {empty:,} without boxes left out,"
        f" {len(val):,} held out; {lost + lost_too} boxes without area left out"
    )
    return DataSet(
        name="COCO",
        train=ListedInstances(teaching, files[0]),
        val=ListedInstances(val, files[1]),
        num_classes=len(first),
        class_names=tuple(first.values()),
        notes=(note,),
    )


def _annotations(root: Path, part: str) -> Path:
    folder = root / "annotations"
    files = sorted(folder.glob(f"instances_{part}*.json"))
    if len(files) != 1:
        name = f"instances_{part}*.json"
        raise DataError(f"{folder} has {len(files)} files {name}, expected one")
    return files[0]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_object(file, "what COCO describes instances with", _FORM)
    except (ValueError, OSError) as error:
        raise DataError(str(error).splitlines()[0]) from None
    for name in _FORM:
        if not content[name]:
            raise DataError(f"{file} has no {name}, expected at least one")
        ((number, times),) = Counter(each["id"] for each in content[name]).most_common(1)
        if times > 1:
            raise DataError(f"{file}: {name} have the id {number} twice, expected each once")
    for each in content["images"]:
        if min(each["width"], each["height"]) < 1:
            size = f"{each['width']} x {each['height']}"
            raise DataError(
                f"{file}: image {each['id']} is {size} pixels, expected sides of 1 or more"
            )
    return content


def _categories(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    """Return names of the categories by id, in order."""
    named = sorted((each["id"], each["name"]) for each in content["categories"])
    if len(named) < 2:
        raise DataError(f"{file} has {len(named)} categories, expected at least 2")
    return dict(named)


def _entries(
    content: Mapping[str, Any], file: Path, labels: Mapping[int, int]
) -> tuple[list[Entry], int]:
    """Return an entry for each image, and how many boxes have no area."""
    images = {each["id"]: each for each in content["images"]}
    own: dict[int, list[tuple[Any, ...]]] = {number: [] for number in images}
    lost = 0
    for each in content["annotations"]:
        where = f"{file}: annotation {each['id']}"
        for name, known in (("image_id", images), ("category_id", labels)):
            if each[name] not in known:
                raise DataError(f"{where} has {name} {each[name]}, expected one that the file has")
        image = images[each["image_id"]]
        box = _box(each["bbox"], image, where)
        if box is None:
            lost += 1
            continue
        crowd = each.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{where} has iscrowd {short_repr(crowd)}, expected 0 or 1")
        outline = _outline(each.get("segmentation"), (image["width"], image["height"]), where)
        row = (each["id"], box, labels[each["category_id"]], bool(crowd), outline)
        own[each["image_id"]].append(row)
    place = _folder(file, [each["file_name"] for each in content["images"]])
    return [_entry(place, images[number], rows) for number, rows in own.items()], lost


def _entry(place: Path, image: Mapping[str, Any], rows: Sequence[tuple[Any, ...]]) -> Entry:
    ids, boxes, labels, crowd, outlines = zip(*rows, strict=True) if rows else ((),) * 5
    return Entry(
        str(place / image["file_name"]),
        (image["width"], image["height"]),
        tuple(ids),
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(crowd, dtype=bool),
        tuple(outlines),
    )


def _folder(file: Path, names: Sequence[str]) -> Path:
    """Return where the images of a file of annotations are; all have to be there."""
    stem, root = file.stem.removeprefix("instances_"), file.parents[1]
    places = [place for place in (root / stem, root / "images" / stem) if place.is_dir()]
    if not places:
        raise DataError(f"{root / stem} is missing, expected the folder of the images of {file}")
    there = {path.name for path in places[0].iterdir()}
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(f"{places[0]} lacks {len(missing)} images of {file}, such as {missing[0]}")
    return places[0]


def _box(
    bbox: Sequence[float], image: Mapping[str, Any], where: str
) -> tuple[float, float, float, float] | None:
    """Return left, top, right and bottom, or None if there is nothing between them."""
    width, height = image["width"], image["height"]
    inside = f"left, top, width and height within image {image['id']} of {width} x {height} pixels"
    if len(bbox) != 4:
        raise DataError(f"{where} has bbox {short_repr(bbox)}, expected {inside}")
    left, top, wide, tall = bbox
    right, bottom = left + wide, top + tall
    out = max(-left, -top, right - width, bottom - height) > _SLACK
    if out or wide < 0 or tall < 0:
        raise DataError(f"{where} has bbox {short_repr(list(bbox))}, expected {inside}")
    box = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    return box if box[0] < box[2] and box[1] < box[3] else None


def _outline(segmentation: Any, size: tuple[int, int], where: str) -> Any:
    """Return polygons or runs as arrays; None if there is no segmentation."""
    if segmentation is None:
        return None
    if isinstance(segmentation, list) and segmentation:
        if all(map(_is_polygon, segmentation)):
            return tuple(np.array(own, np.float32).reshape(-1, 2) for own in segmentation)
    elif isinstance(segmentation, dict):
        runs = segmentation.get("counts")
        counted = isinstance(runs, list) and all(is_whole(n) and n >= 0 for n in runs)
        if counted and sum(cast("list[int]", runs)) == size[0] * size[1]:
            return np.array(runs, dtype=np.int64)
    raise DataError(
        f"{where} has segmentation {short_repr(segmentation)}, expected polygons of 3 points or"
        f" more, or counts of runs over {size[0]} x {size[1]} pixels"
    )


def _is_polygon(points: Any) -> bool:
    """Whether something is x and y of 3 points or more."""
    listed = isinstance(points, list) and len(points) >= 6 and not len(points) % 2
    return listed and all(map(is_number, points))
