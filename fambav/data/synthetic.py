"""Generated data sets: SHAPES100, an upper and a lower shape in clutter, and FAKE, plain noise.

A class of SHAPES100 is an ordered pair such as "ring over tee".  Which shapes there are is a matter
of local form, which of them is the upper one is a matter of position.  Left and right mean nothing:
a mirrored image keeps its class.  Colours, sizes, rotations, positions, background, strokes and
noise are drawn anew for each image.

An image is a function of its part and its index.  SHAPES100 is integer arithmetic on hashed
counters, so that the set is the same, bit by bit, on every machine and with every version of numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fambav.data.instances import InstanceArraySet
from fambav.data.types import ArraySet, DataSet, digest
from fambav.seeding import key

Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]
Form = Callable[[Ints, Ints], Mask]

SIDE = 32  # pixels
_COUNTS = (10_000, 2_000)
_LABEL_STEP = 37  # from a label to the next; shares no factor with 100

# Lengths are in eighths of a pixel, colours in steps of 1/255.
_PIXEL = 8
_SIZE = (42, 60)  # half the height of a shape
_MAX_ANGLE = 18  # largest rotation of a shape, in degrees
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
_CHUNK = 500  # images generated at once, to bound the memory

_FAKE_COUNTS = (1280, 256)
_UNIFORM_STD = 12**-0.5  # of a number drawn evenly from [0, 1]


# Points of each shape; u goes to the right and v down, and u and -u are alike.
FORMS: dict[str, Form] = {
    "disc": lambda u, v: u * u + v * v < 240 * 240,
    "ring": lambda u, v: (u * u + v * v < 250 * 250) & (u * u + v * v > 125 * 125),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 210,
    "frame": lambda u, v: abs(np.maximum(abs(u), abs(v)) - 165) < 55,
    "triangle": lambda u, v: (v < 190) & (2 * abs(u) < v + 260),
    "rhombus": lambda u, v: 2 * abs(u) + abs(v) < 300,
    "plus": lambda u, v: (np.minimum(abs(u), abs(v)) < 70) & (np.maximum(abs(u), abs(v)) < 245),
    "hourglass": lambda u, v: (abs(u) < abs(v) + 20) & (abs(v) < 225),
    "arch": lambda u, v: (np.maximum(abs(u), abs(v)) < 220) & ((abs(u) > 110) | (v < -100)),
    "tee": lambda u, v: (abs(v) < 230) & (((v < -100) & (abs(u) < 225)) | (abs(u) < 70)),
}
CLASS_NAMES = tuple(f"{upper} over {lower}" for upper in FORMS for lower in FORMS)


def _stroke(u: Ints, v: Ints) -> Mask:
    return (abs(u) < 250) & (abs(v) < 45)


class CounterRNG:
    """Random integers that depend on the part, the image's index and how many were drawn before.

    Args:
        part: "train" or "val".
        indices: (count,), the images to draw for.
    """

    def __init__(self, part: str, indices: NDArray[np.int64]) -> None:
        self.states = _splitmix64(indices.astype(np.uint64) + np.uint64(key("SHAPES100", part)))
        self.drawn = 0

    def uniform(self, low: int, high: int, *shape: int) -> Ints:
        """Return (images, *shape) integers from `low` to `high`, both included, uniformly."""
        scaled = (self._words(math.prod(shape)) >> np.uint64(33)) * np.uint64(high - low + 1)
        numbers: Ints = (scaled >> np.uint64(31)).astype(np.int32) + low
        return numbers.reshape(-1, *shape)

    def triangular(self, *shape: int) -> Ints:
        """Return (images, *shape) integers from -255 to 255, the smaller the likelier."""
        octets = self._words(math.prod(shape) // 4).astype("<u8").view(np.uint8)
        pairs = octets.astype(np.int32).reshape(-1, *shape, 2)
        difference: Ints = pairs[..., 0] - pairs[..., 1]
        return difference

    def _words(self, count: int) -> NDArray[np.uint64]:
        counters = np.arange(self.drawn + 1, self.drawn + count + 1, dtype=np.uint64)
        self.drawn += count
        return _splitmix64(self.states[:, None] + counters * np.uint64(0x9E3779B97F4A7C15))


def _splitmix64(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash numbers of 64 bits.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return hashed


def _background_noise(rng: CounterRNG) -> Ints:
    """Return (images, SIDE, SIDE, 3) of mean 0: random at the nodes, linear between them."""
    nodes = SIDE // _CELL + 1
    grey, tint = (rng.uniform(-_SPOTS, _SPOTS, nodes, nodes, depth) for depth in (1, 3))
    noise: Ints = grey + tint // 2
    cell = np.arange(SIDE) // _CELL
    after: Ints = np.arange(SIDE, dtype=np.int32)[:, None] % _CELL
    before: Ints = _CELL - after
    across: Ints = noise[:, :, cell] * before + noise[:, :, cell + 1] * after
    both: Ints = across[:, cell] * before[:, None] + across[:, cell + 1] * after[:, None]
    return both // _CELL**2


def _table(function: Callable[[float], float]) -> Ints:
    """Return a function of 0 to 359 degrees, in steps of 1/1024."""
    return np.array([round(1024 * function(math.radians(d))) for d in range(360)], dtype=np.int32)


_COSINE, _SINE = _table(math.cos), _table(math.sin)


def coverage(form: Form, x: Ints, y: Ints, size: Ints, angle: Ints) -> Ints:
    """Return how much of each pixel a shape covers.

    Args:
        form: Which points belong to it.
        x: (images,), distance of its middle from the left, in eighths of a pixel.
        y: (images,), distance of its middle from the top, in eighths of a pixel.
        size: (images,), half its height, in eighths of a pixel.
        angle: (images,), its rotation, in degrees.

    Returns:
        (images, SIDE, SIDE), in quarters.
    """
    scale = (_UNIT << 10) // size
    cosine, sine = (table[angle % 360] * scale >> 10 for table in (_COSINE, _SINE))
    points = np.arange(SIDE * _FINE, dtype=np.int32) * (_PIXEL // _FINE) + _PIXEL // _FINE // 2
    across, down = points - x[:, None], points - y[:, None]
    u = ((across * cosine[:, None])[:, None, :] + (down * sine[:, None])[:, :, None]) >> 10
    v = ((down * cosine[:, None])[:, :, None] - (across * sine[:, None])[:, None, :]) >> 10
    inside = form(u, v).view(np.uint8)
    rows = inside[:, ::_FINE] + inside[:, 1::_FINE]
    return (rows[:, :, ::_FINE] + rows[:, :, 1::_FINE]).astype(np.int32)


def _blend(images: Ints, cover: Ints, colour: Ints) -> Ints:
    """Lay a colour, (images, 3), over images, (images, SIDE, SIDE, 3)."""
    return images + ((colour[:, None, None] - images) * cover[..., None] >> _FINE)


def _brighter(colour: Ints, rng: CounterRNG, least: int) -> Ints:
    """Return colours that are brighter by `least` to twice that, give or take a tint."""
    lift = rng.uniform(least, 2 * least, 1) + rng.uniform(-_TINT, _TINT, 3)
    return np.minimum(colour + lift, 255)


def render(part: str, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Draw images of SHAPES100, without masks; arguments as of `render_masks`."""
    return render_masks(part, indices, labels)[0]


def render_masks(
    part: str, indices: NDArray[np.int64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw images of SHAPES100, and which of their two shapes is in each pixel.

    Args:
        part: "train" or "val".
        indices: (count,), their indices in that part.
        labels: (count,), their classes.

    Returns:
        Images, (count, SIDE, SIDE, 3), and masks, (count, SIDE, SIDE): 1 where the upper shape
        covers half of the pixel, 2 where the lower one or both do; 0 for none.
    """
    rng = CounterRNG(part, indices)
    mean = rng.uniform(*_BACKGROUND, 3)
    images = mean[:, None, None] + _background_noise(rng)  # (count, SIDE, SIDE, 3)
    span = SIDE * _PIXEL
    for _ in range(_STROKES):
        x, y = rng.uniform(0, span, 2).T
        cover = coverage(_stroke, x, y, rng.uniform(24, 80), rng.uniform(0, 179))
        images = _blend(images, cover, _brighter(mean, rng, _CONTRAST // 2))
    size = rng.uniform(*_SIZE, 2)
    x = span // 2 + rng.uniform(-_ASIDE, _ASIDE, 2)
    y = np.array([1, 3], dtype=np.int32) * span // 4 + rng.uniform(-_UPWARDS, _UPWARDS, 2)
    angle = rng.uniform(-_MAX_ANGLE, _MAX_ANGLE, 2)
    masks = np.zeros(images.shape[:-1], dtype=np.uint8)
    for shape, kinds in enumerate(np.divmod(labels, len(FORMS))):
        cover = np.empty(images.shape[:-1], dtype=np.int32)
        for kind, form in enumerate(FORMS.values()):
            chosen = kinds == kind
            cover[chosen] = coverage(form, *(t[chosen, shape] for t in (x, y, size, angle)))
        images = _blend(images, cover, _brighter(mean, rng, _CONTRAST))
        masks[2 * cover >= 1 << _FINE] = shape + 1
    grey, tint = rng.triangular(SIDE, SIDE, 1), rng.triangular(SIDE, SIDE, 3)
    images += grey * _NOISE // 256 + tint * _NOISE // 512
    return np.clip(images, 0, 255).astype(np.uint8), masks


def kinds_of(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the number, from 0, of the upper and the lower shape of each class, (count, 2)."""
    return np.stack(np.divmod(labels, len(FORMS)), axis=1).astype(np.uint8)


def _render_part(part: str, count: int) -> tuple[NDArray[Any], ...]:
    """Draw the first images of a part; every hundred in a row show each class once.

    Returns:
        Images, masks as of `render_masks`, and labels.
    """
    indices = np.arange(count)
    labels: NDArray[Any] = indices * _LABEL_STEP % len(CLASS_NAMES)
    chunks = np.split(indices, range(_CHUNK, count, _CHUNK))
    drawn = [render_masks(part, chunk, labels[chunk]) for chunk in chunks]
    images, masks = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
    return images, masks, labels


def shapes100(*, counts: tuple[int, int] = _COUNTS) -> DataSet:
    """Generate SHAPES100, held in memory.

    Args:
        counts: Images to train and held out; fewer are the first of the whole set.
    """
    parts = map(_render_part, ("train", "val"), counts)
    train, val = (ArraySet(images, labels) for images, _, labels in parts)
    sha = digest(train, val)
    note = (
        f"SHAPES100: {len(train):,} images made to train and {len(val):,} held out, "
        f"sha256 {sha[:16]}"
    )
    return DataSet.in_memory(
        "SHAPES100", train, val, class_names=CLASS_NAMES, notes=(note,), digest=sha
    )


def shapes_seg(*, counts: tuple[int, int] = _COUNTS) -> DataSet:
    """Generate SHAPES-SEG, held in memory: the images of SHAPES100, and the shape in each pixel.

    Args:
        counts: Images to train and held out; fewer are the first of the whole set.
    """
    parts = []
    for images, masks, labels in map(_render_part, ("train", "val"), counts):
        table = np.pad(kinds_of(labels) + 1, ((0, 0), (1, 0)))  # label of 0, 1 and 2, (count, 3)
        parts.append(ArraySet(images, table[np.arange(len(labels))[:, None, None], masks]))
    return DataSet.in_memory("SHAPES-SEG", *parts, class_names=("background", *FORMS))


def shapes_det(*, counts: tuple[int, int] = _COUNTS) -> DataSet:
    """Generate SHAPES-DET, held in memory: the images of SHAPES100, with a box for each shape.

    Args:
        counts: Images to train and held out; fewer are the first of the whole set.
    """
    train, val = (
        InstanceArraySet(images, kinds_of(labels), masks)
        for images, masks, labels in map(_render_part, ("train", "val"), counts)
    )
    sha = digest(train, val, train.masks, val.masks)
    return DataSet.in_memory("SHAPES-DET", train, val, class_names=tuple(FORMS), digest=sha)


class FakeImages:
    """Noise, each image a function of seed, part and index; labels cycle through the classes.

    Args:
        part: "train" or "val".
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

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self.count:
            raise IndexError(f"index is {index}, expected one below {self.count}")
        generator = torch.Generator().manual_seed(key(self.seed, "fake", self.part, index))
        pixels = torch.randint(256, (*self.image_size, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy()), index % self.classes


def fake(*, classes: int, image_size: tuple[int, int], seed: int) -> DataSet:
    """Return noise of any size, for measuring speed.

    Args:
        classes: Number of classes.
        image_size: Height and width, in pixels.
        seed: Seed of the images.
    """
    train, val = (
        FakeImages(part, count=count, classes=classes, image_size=image_size, seed=seed)
        for part, count in zip(("train", "val"), _FAKE_COUNTS, strict=True)
    )
    return DataSet(
        name="FAKE",
        train=train,
        val=val,
        num_classes=classes,
        mean=(0.5, 0.5, 0.5),
        std=(_UNIFORM_STD, _UNIFORM_STD, _UNIFORM_STD),
    )
