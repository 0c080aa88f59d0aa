"""How the schedule of a reduction is written.

    r:5              5 tokens at every layer
    r:5@3-23/2       5 at layers 3, 5, ..., 23; also r:5@5,10,15
    ramp:16,-1       from 32 at the first layer in equal steps to 0 at the last
    list:7,7,0,7     so many at layers 1, 2, 3 and 4, none at the others
    keep:0.8@5,10    this share of the patches stays at layers 5 and 10
    tokens:157,125@10,20    so many tokens are left after layers 10 and 20

Layers count from 1.  The ramp from r (1 - slope) to r (1 + slope) is that of Bolya et al., "Token
Merging", arXiv:2210.09461, section 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from fambav.registry import SCHEDULES

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:/([1-9]\d*))?)?")


class _Written(NamedTuple):
    """A schedule's words, taken apart, and the model it is for."""

    text: str
    values: list[float]
    layers: Sequence[int]
    depth: int
    start: int
    classes: int

    def exactly(self, length: int, expected: str) -> list[float]:
        """Return the numbers, of which there must be so many."""
        if len(self.values) != length:
            raise _wrong(self.text, expected)
        return self.values


def counts(text: str, *, depth: int, start: int, classes: int) -> tuple[int, ...]:
    """Read a schedule.

    Args:
        text: As above.
        depth: Number of layers.
        start: Tokens before the first layer, class tokens included.
        classes: Class tokens among them.

    Returns:
        Tokens removed at each layer; the first is layer 1's.

    Raises:
        ValueError: If the text has another form, a layer is not there, layers do not ascend, a
            share is not more than 0 and at most 1, or nothing would be removed.
    """
    kind, colon, rest = text.partition(":")
    numbers, at, where = rest.partition("@")
    readers = {"r": _constant, "ramp": _ramp, "list": _list, "keep": _keep, "tokens": _tokens}
    if not colon or kind not in readers or (at and kind == "list"):
        raise _wrong(text, f"one of {SCHEDULES}")
    values = _numbers(text, numbers, whole=kind not in ("keep", "ramp"))
    layers = _layers(text, where, depth) if at else range(1, depth + 1)
    given = readers[kind](_Written(text, values, layers, depth, start, classes))
    found = dict(zip(layers, given, strict=True))
    if any(count < 0 for count in found.values()):
        raise _wrong(text, "lengths that do not grow")
    if not any(found.values()):
        raise _wrong(text, "one that removes tokens")
    return tuple(found.get(number, 0) for number in range(1, depth + 1))


def _constant(written: _Written) -> Iterable[int]:
    (count,) = written.exactly(1, "one number of tokens, such as r:5")
    return [int(count)] * len(written.layers)


def _ramp(written: _Written) -> Iterable[int]:
    mean, slope = written.exactly(2, "two numbers, such as ramp:16,-1")
    if mean != int(mean) or not -1 <= slope <= 1:
        raise _wrong(written.text, "a whole number of tokens and a slope from -1 to 1")
    first, steps = int(mean * (1 - slope)), max(len(written.layers) - 1, 1)
    return [int(first + 2 * (mean - first) * n / steps) for n in range(len(written.layers))]


def _list(written: _Written) -> Iterable[int]:
    given, depth = written.values, written.depth
    if len(given) > depth:
        raise _wrong(written.text, f"at most {depth} numbers, one for each layer")
    return [int(count) for count in given] + [0] * (depth - len(given))


def _keep(written: _Written) -> Iterable[int]:
    layers, shares = len(written.layers), written.values
    if len(shares) > 1:
        shares = written.exactly(layers, "one share, or one for each layer")
    patches, found = written.start - written.classes, []
    for share in shares * (layers // len(shares)):
        if not 0 < share <= 1:
            raise _wrong(written.text, "shares of more than 0 and at most 1")
        left = math.ceil(round(patches * share, 6))
        found.append(patches - left)
        patches = left
    return found


def _tokens(written: _Written) -> Iterable[int]:
    left = written.exactly(len(written.layers), "as many lengths as layers")
    return [int(a - b) for a, b in pairwise((written.start, *left))]


def _numbers(text: str, words: str, *, whole: bool) -> list[float]:
    pattern = r"\d+" if whole else r"-?\d+(\.\d*)?|-?\.\d+"
    parts = [word.strip() for word in words.split(",")]
    if not all(re.fullmatch(pattern, part) for part in parts):
        raise _wrong(text, f"one of {SCHEDULES}")
    return [float(part) for part in parts]


def _layers(text: str, words: str, depth: int) -> list[int]:
    """Read "3-23/2" and "5,10,15"."""
    layers: list[int] = []
    for word in words.split(","):
        found = _RANGE.fullmatch(word.strip())
        if found is None:
            raise _wrong(text, "layers such as 5,10,15 or 3-23/2")
        first, last, step = found[1], found[2] or found[1], found[3] or "1"
        layers += range(int(first), int(last) + 1, int(step))
    if not layers or not all(1 <= layer <= depth for layer in layers):
        raise _wrong(text, f"layers from 1 to {depth}")
    if any(b <= a for a, b in pairwise(layers)):
        raise _wrong(text, "ascending layers, none twice")
    return layers


def _wrong(text: str, expected: str) -> ValueError:
    return ValueError(f"reduction_schedule is {text!r}, expected {expected}")
