"""From the pixels of a mask's file to labels, and back to pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from fambav.arguments import is_whole
from fambav.data.folders import open_image
from fambav.data.types import IGNORE, DataError
from fambav.short_repr import short_repr

Labels = NDArray[np.uint8]

_LARGEST = 2**16 - 1  # index
_UNKNOWN = 254  # in tables of labels; there are at most 254 classes
_KEYS = ("classes", "ignore", "unknown", "images", "masks", "mask_suffix")
_FORM = "a colour such as '#ff0000' or [255, 0, 0], or an index from 0 to 65535"
_WEIGHT = 0.5  # of the colours of an overlay


class Palette(NamedTuple):
    """What the pixels of masks mean.

    Attributes:
        names: Of the classes, in order.
        coloured: Whether pixels are colours, in RGB, and not indices.
        table: Label of each colour, R * 65536 + G * 256 + B, or of each index.
    """

    names: tuple[str, ...]
    coloured: bool
    table: Labels

    @classmethod
    def of(
        cls, classes: Mapping[str, Any], *, ignore: Sequence[Any] = (), unknown: str = "error"
    ) -> Palette:
        """Make a palette.

        Args:
            classes: Colour, (R, G, B) or "#rrggbb", or index of each class, by its name.
            ignore: Those of pixels that neither teach nor count.
            unknown: "error" refuses others, "ignore" ignores them.

        Raises:
            ValueError: If there are under 2 classes or over 254, one is no colour or index, some
                are colours and some indices, or two are equal.
        """
        if not 2 <= len(classes) <= _UNKNOWN:
            raise ValueError(f"classes are {len(classes)}, expected 2 to {_UNKNOWN}")
        if unknown not in ("error", "ignore"):
            raise ValueError(f"unknown is {short_repr(unknown)}, expected 'error' or 'ignore'")
        values = [*classes.values(), *ignore]
        codes = [_code(value) for value in values]
        coloured = not is_whole(values[0])
        others = _UNKNOWN if unknown == "error" else IGNORE
        table = np.full(2**24 if coloured else _LARGEST + 1, others, dtype=np.uint8)
        for number, (value, code) in enumerate(zip(values, codes, strict=True)):
            if is_whole(value) == coloured:
                kind = "a colour" if coloured else "an index"
                raise ValueError(f"{short_repr(value)} is there, expected {kind} as the others are")
            if code in codes[:number]:
                raise ValueError(f"{short_repr(value)} is there twice, expected each once")
            table[code] = number if number < len(classes) else IGNORE
        return cls(tuple(map(str, classes)), coloured, table)

    def read(self, path: str | Path) -> Labels:
        """Return the labels of a mask, (height, width); IGNORE for none.

        Raises:
            DataError: If the file is no image, of another kind, or has an unknown pixel, which is
                named by its row and column, counted from 0.
        """
        with open_image(Path(path)) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB") if self.coloured else image).astype(np.int32)
        if self.coloured:
            codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
        elif pixels.ndim == 2 and mode != "F":
            codes = np.where(pixels < 0, _LARGEST, np.minimum(pixels, _LARGEST))
        else:
            raise DataError(f"{path} has mode {mode}, expected one channel with indices of classes")
        labels: Labels = self.table[codes]  # (height, width)
        unknown = labels == _UNKNOWN
        if unknown.any():
            row, column = map(int, np.argwhere(unknown)[0])
            code = int(codes[row, column])
            shown = f"#{code:06x}" if self.coloured else str(code)
            raise DataError(
                f"{path}: row {row}, column {column} is {shown}, expected a"
                f" {'colour' if self.coloured else 'index'} of the palette; unknown: ignore there"
                " ignores others"
            )
        return labels


def read_palette(path: Path) -> tuple[Palette, dict[str, str]]:
    """Read a palette file, and how the folders beside it are named.

    classes: {name: colour or index}; ignore: [colour or index]; unknown: error or ignore; images,
    masks: names of the folders, by default the same; mask_suffix: what names of masks have behind
    those of images.

    Raises:
        DataError: If it is missing or has another form.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing, expected classes: with a line NAME: '#rrggbb' or NAME: INDEX each"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("classes"), dict):
        raise DataError(f"{path} has no classes, expected classes: with a line for each")
    wrong = [key for key in content if key not in _KEYS]
    if wrong:
        raise DataError(f"{path} has {short_repr(wrong[0])}, expected {', '.join(_KEYS)}")
    named = {key: content.get(key, default) for key, default in _FOLDERS.items()}
    for key, name in named.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w .-]*", name) or name == "..":
            raise DataError(f"{path}: {key} is {short_repr(name)}, expected a name")
    ignore = content.get("ignore") or []
    if not isinstance(ignore, list):
        raise DataError(f"{path}: ignore is {short_repr(ignore)}, expected a list")
    try:
        unknown = content.get("unknown", "error")
        return Palette.of(content["classes"], ignore=ignore, unknown=unknown), named
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


_FOLDERS = {"images": "images", "masks": "masks", "mask_suffix": ""}


def _code(value: Any) -> int:
    """Return a colour as one number, or an index."""
    if is_whole(value) and 0 <= value <= _LARGEST:
        return int(value)
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        return int(value[1:], 16)
    three = isinstance(value, list | tuple) and len(value) == 3
    if three and all(is_whole(v) and 0 <= v <= 255 for v in value):
        return int(value[0] << 16 | value[1] << 8 | value[2])
    raise ValueError(f"{short_repr(value)} is of no known form, expected {_FORM}")


def colours() -> NDArray[np.uint8]:
    """Return a colour for each label, (256, 3); that of IGNORE is white.

    Source: the colour map of PASCAL VOC, whose bits are those of the label, taken in turn.
    """
    table = np.zeros((256, 3), dtype=np.uint8)
    labels = np.arange(256, dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            table[:, channel] |= ((labels >> channel) & 1) << (7 - place)
        labels >>= 3
    table[IGNORE] = 255
    return table


def palette_image(mask: Labels) -> Image.Image:
    """Return a mask, (height, width), as an image of indices with colours."""
    image = Image.fromarray(mask)
    image.putpalette(colours().ravel().tolist())
    return image


def overlay(image: Image.Image, mask: Labels) -> Image.Image:
    """Return an image under the colours of its mask, half and half."""
    return Image.blend(image.convert("RGB"), palette_image(mask).convert("RGB"), _WEIGHT)
