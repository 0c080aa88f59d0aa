"""SHAPES100: 100 classes of small made images, an upper and a lower shape each, in clutter.

A class is an ordered pair such as "ring over tee".  Which shapes there are is a matter of local
form, which of them is the upper one is a matter of place.  Left and right mean nothing: a mirrored
image keeps its class.  Colours, sizes, turns, places, background, strokes and noise are drawn anew
for each image.

An image is a function of its part and its place.  Everything is integer arithmetic on hashed
counters, so that the set is the same, bit by bit, on every machine and with every version of numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fambav.data.arrays import ArraySet, DataSet, digest
from fambav.seeding import key

Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]
Form = Callable[[Ints, Ints], Mask]

SIDE = 32  # pixels
_COUNTS = (10_000, 2_000)
_STEP = 37  # from a label to the next; shares no factor with 100

# Lengths are in eighths of a pixel, colours in steps of 1/255.
_PIXEL = 8
_SIZE = (42, 60)  # half the height of a shape
_TURN = 18  # largest rotation of a shape, in degrees
_ASIDE, _UPWARDS = 36, 16  # how far a shape may lie from the middle of its half
_STROKES = 2
_BACKGROUND = (35, 65)
_SPOTS = 12  # strength of the background's spots
_CONTRAST = 72  # least by which a shape is brighter
_TINT = 30  # most by which its channels differ from that
_NOISE = 28

_FINE = 2  # points per pixel and axis that decide how much of it a shape covers
_UNIT = 256  # half the height of a shape in its own coordinates
_CELL = 8  # pixels between the nodes of the background
_CHUNK = 500  # images made at once, to bound the memory


def _disc(u: Ints, v: Ints) -> Mask:
    return u * u + v * v < 240 * 240


def _ring(u: Ints, v: Ints) -> Mask:
    square = u * u + v * v
    return (square < 250 * 250) & (square > 125 * 125)


def _square(u: Ints, v: Ints) -> Mask:
    return np.maximum(abs(u), abs(v)) < 210


def _frame(u: Ints, v: Ints) -> Mask:
    far = np.maximum(abs(u), abs(v))
    return (far < 220) & (far > 110)


def _triangle(u: Ints, v: Ints) -> Mask:
    return (v < 190) & (2 * abs(u) < v + 260)


def _rhombus(u: Ints, v: Ints) -> Mask:
    return 2 * abs(u) + abs(v) < 300


def _plus(u: Ints, v: Ints) -> Mask:
    u, v = abs(u), abs(v)
    return (np.minimum(u, v) < 70) & (np.maximum(u, v) < 245)


def _hourglass(u: Ints, v: Ints) -> Mask:
    v = abs(v)
    return (abs(u) < v + 20) & (v < 225)


def _arch(u: Ints, v: Ints) -> Mask:
    u = abs(u)
    return (np.maximum(u, abs(v)) < 220) & ((u > 110) | (v < -100))


def _tee(u: Ints, v: Ints) -> Mask:
    u = abs(u)
    return (abs(v) < 230) & (((v < -100) & (u < 225)) | (u < 70))


def _stroke(u: Ints, v: Ints) -> Mask:
    return (abs(u) < 250) & (abs(v) < 45)


# Points of each shape; u goes to the right and v down, and u and -u are alike.
FORMS: dict[str, Form] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "rhombus": _rhombus,
    "plus": _plus,
    "hourglass": _hourglass,
    "arch": _arch,
    "tee": _tee,
}
CLASS_NAMES = tuple(f"{upper} over {lower}" for upper in FORMS for lower in FORMS)


class Draws:
    """Random integers that depend on the part, the place and how many were drawn before.

    Args:
        part: Keeps training and held-out images apart.
        places: (count,), the images to draw for.
    """

    def __init__(self, part: str, places: NDArray[np.int64]) -> None:
        self.states = _scrambled(places.astype(np.uint64) + np.uint64(key("SHAPES100", part)))
        self.drawn = 0

    def whole(self, low: int, high: int, *shape: int) -> Ints:
        """Return (images, *shape) integers from `low` to `high`, both included, all as likely."""
        found = (self._words(math.prod(shape)) >> np.uint64(33)) * np.uint64(high - low + 1)
        numbers: Ints = (found >> np.uint64(31)).astype(np.int32) + low
        return numbers.reshape(-1, *shape)

    def bell(self, *shape: int) -> Ints:
        """Return (images, *shape) integers from -255 to 255, the smaller the likelier."""
        octets = self._words(math.prod(shape) // 4).astype("<u8").view(np.uint8)
        pairs = octets.astype(np.int32).reshape(-1, *shape, 2)
        difference: Ints = pairs[..., 0] - pairs[..., 1]
        return difference

    def _words(self, count: int) -> NDArray[np.uint64]:
        counters = np.arange(self.drawn + 1, self.drawn + count + 1, dtype=np.uint64)
        self.drawn += count
        return _scrambled(self.states[:, None] + counters * np.uint64(0x9E3779B97F4A7C15))


def _scrambled(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash numbers of 64 bits.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return scrambled


def _spots(draws: Draws) -> Ints:
    """Return what a background adds to its mean, (images, SIDE, SIDE, 3): nodes and between."""
    nodes = SIDE // _CELL + 1
    grey, tint = (draws.whole(-_SPOTS, _SPOTS, nodes, nodes, depth) for depth in (1, 3))
    spots: Ints = grey + tint // 2
    cell = np.arange(SIDE) // _CELL
    after: Ints = np.arange(SIDE, dtype=np.int32)[:, None] % _CELL
    before: Ints = _CELL - after
    across: Ints = spots[:, :, cell] * before + spots[:, :, cell + 1] * after
    both: Ints = across[:, cell] * before[:, None] + across[:, cell + 1] * after[:, None]
    return both // _CELL**2


def _table(function: Callable[[float], float]) -> Ints:
    """Return a function of 0 to 359 degrees, in steps of 1/1024."""
    return np.array([round(1024 * function(math.radians(d))) for d in range(360)], dtype=np.int32)


_COSINE, _SINE = _table(math.cos), _table(math.sin)


def covered(form: Form, x: Ints, y: Ints, size: Ints, turn: Ints) -> Ints:
    """Tell how much of each pixel a shape covers.

    Args:
        form: Which points belong to it.
        x: (images,), how far its middle is from the left, in eighths of a pixel.
        y: (images,), how far its middle is from the top, in eighths of a pixel.
        size: (images,), half its height, in eighths of a pixel.
        turn: (images,), its rotation, in degrees.

    Returns:
        (images, SIDE, SIDE), in quarters.
    """
    scale = (_UNIT << 10) // size
    cosine, sine = (table[turn % 360] * scale >> 10 for table in (_COSINE, _SINE))
    points = np.arange(SIDE * _FINE, dtype=np.int32) * (_PIXEL // _FINE) + _PIXEL // _FINE // 2
    across, down = points - x[:, None], points - y[:, None]
    u = ((across * cosine[:, None])[:, None, :] + (down * sine[:, None])[:, :, None]) >> 10
    v = ((down * cosine[:, None])[:, :, None] - (across * sine[:, None])[:, None, :]) >> 10
    inside = form(u, v).view(np.uint8)
    rows = inside[:, ::_FINE] + inside[:, 1::_FINE]
    return (rows[:, :, ::_FINE] + rows[:, :, 1::_FINE]).astype(np.int32)


def _painted(images: Ints, cover: Ints, colour: Ints) -> Ints:
    """Lay a colour, (images, 3), over images, (images, SIDE, SIDE, 3)."""
    return images + ((colour[:, None, None] - images) * cover[..., None] >> _FINE)


def _brighter(colour: Ints, draws: Draws, least: int) -> Ints:
    """Return colours that are brighter by `least` to twice that, give or take a tint."""
    lift = draws.whole(least, 2 * least, 1) + draws.whole(-_TINT, _TINT, 3)
    return np.minimum(colour + lift, 255)


def drawn(part: str, places: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Make images.

    Args:
        part: "train" or "val".
        places: (count,), their places in that part.
        labels: (count,), their classes.

    Returns:
        (count, SIDE, SIDE, 3).
    """
    draws = Draws(part, places)
    mean = draws.whole(*_BACKGROUND, 3)
    images = mean[:, None, None] + _spots(draws)
    span = SIDE * _PIXEL
    for _ in range(_STROKES):
        x, y = draws.whole(0, span, 2).T
        cover = covered(_stroke, x, y, draws.whole(24, 80), draws.whole(0, 179))
        images = _painted(images, cover, _brighter(mean, draws, _CONTRAST // 2))
    size = draws.whole(*_SIZE, 2)
    x = span // 2 + draws.whole(-_ASIDE, _ASIDE, 2)
    y = np.array([1, 3], dtype=np.int32) * span // 4 + draws.whole(-_UPWARDS, _UPWARDS, 2)
    turn = draws.whole(-_TURN, _TURN, 2)
    for shape, kinds in enumerate(np.divmod(labels, len(FORMS))):
        cover = np.empty(images.shape[:-1], dtype=np.int32)
        for kind, form in enumerate(FORMS.values()):
            these = kinds == kind
            cover[these] = covered(form, *(t[these, shape] for t in (x, y, size, turn)))
        images = _painted(images, cover, _brighter(mean, draws, _CONTRAST))
    grey, tint = draws.bell(SIDE, SIDE, 1), draws.bell(SIDE, SIDE, 3)
    images += grey * _NOISE // 256 + tint * _NOISE // 512
    clipped: NDArray[np.uint8] = np.clip(images, 0, 255).astype(np.uint8)
    return clipped


def made(part: str, count: int) -> ArraySet:
    """Make the first images of a part; every hundred in a row show each class once."""
    places = np.arange(count)
    labels: NDArray[Any] = places * _STEP % len(CLASS_NAMES)
    chunks = np.split(places, range(_CHUNK, count, _CHUNK))
    return ArraySet(np.concatenate([drawn(part, chunk, labels[chunk]) for chunk in chunks]), labels)


def read(*, counts: tuple[int, int] = _COUNTS) -> DataSet:
    """Make the set.

    Args:
        counts: Images to train and held out; fewer are the first of the whole set.

    Returns:
        The set, held in memory.
    """
    train, val = made("train", counts[0]), made("val", counts[1])
    mean, std = train.statistics()
    sha = digest(train, val)
    return DataSet(
        name="SHAPES100",
        train=train,
        val=val,
        num_classes=len(CLASS_NAMES),
        class_names=CLASS_NAMES,
        mean=mean,
        std=std,
        notes=(
            f"SHAPES100: {len(train):,} images made to train and {len(val):,} held out, "
            f"sha256 {sha[:16]}",
        ),
        digest=sha,
    )
