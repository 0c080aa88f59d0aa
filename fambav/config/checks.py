"""What a single value must be beyond its type and range: functions that a field carries as `check`.

Each raises ValueError with what was expected.  Of a policy timm passes over a part that has no
number, takes an unknown set of operations for the ordinary one and cuts magnitudes off, each
without a word; here they are refused.
"""

from __future__ import annotations

import os
import re

from fambav.config.setting import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, PROBABILITY, Bounds
from fambav.registry import DEVICE_FORM, FOREIGN, MODELS, SCHEDULE_FORM, SCHEDULES, nearest

# What the number of a key may be: whole or not, and in which range.
_WHOLE, _COUNT, _SWITCH = (int, NATURAL), (int, COUNT), (int, Bounds(0, 1))
_TIMES = (int, Bounds(1, 100))  # operations on one image, one after another
_SHARE, _ALPHA = (float, PROBABILITY), (float, POSITIVE)
_MSTD: dict[str, tuple[type, Bounds]] = {"mstd": (float, NOT_NEGATIVE)}
_FAMILIES: dict[str, dict[str, tuple[type, Bounds]]] = {
    "rand": {"m": _WHOLE, "n": _TIMES, "p": _SHARE, **_MSTD, "mmax": _COUNT, "inc": _SWITCH},
    "augmix": {"m": _WHOLE, "w": _TIMES, "d": _TIMES, "a": _ALPHA, "b": _SWITCH, **_MSTD},
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), _MSTD),
}
# Sets of operations, and how many of each may fall on one image: drawn by weight, none comes twice.
_SETS = {"tweights": 15, "t3a": None, "t3aw": 14}
_LIMIT = 10  # timm's largest magnitude without mmax, and that of rand without m
_LAYERS = 2  # timm's n


def model_name(name: str) -> None:
    """Refuse a model that is neither ours nor marked as timm's."""
    if name not in MODELS and not (name.startswith(FOREIGN) and name != FOREIGN):
        hint = nearest(name, MODELS)
        if not hint.startswith("did you mean"):
            hint = f"timm's own models are written {FOREIGN}NAME"
        raise ValueError(f"a model of `fambav list models`; {hint}")


def device_name(name: str) -> None:
    """Refuse what is not `cpu`, `cuda` or `cuda:0` and so on."""
    if not re.fullmatch(DEVICE_FORM, name):
        raise ValueError("cpu, cuda or cuda:N")


def fusion_list(plan: str) -> None:
    """Refuse what is not `layer:tokens,layer:tokens`, each at least 1, no layer twice."""
    pairs = [re.fullmatch(r"\s*0*([1-9]\d*)\s*:\s*0*[1-9]\d*\s*", p) for p in plan.split(",")]
    layers = [pair.group(1) for pair in pairs if pair]
    if len(layers) < len(pairs) or len(set(layers)) < len(layers):
        raise ValueError("layer:tokens pairs such as 6:9,8:9, counted from 1, no layer twice")


def file_path(path: str) -> None:
    """Refuse what no file system can hold."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        encoded = b"\0"
    if b"\0" in encoded:
        raise ValueError("a path of characters that file systems know")


def local_file(path: str) -> None:
    """Refuse an address on the network, and what is no path."""
    file_path(path)
    if re.match(r"[a-z]+://", path):
        raise ValueError("a file on this machine; download it first")


def rising(pair: tuple[float, float]) -> None:
    """Refuse a pair whose second number is not above the first."""
    if not pair[0] < pair[1]:
        raise ValueError("two rising numbers")


def ordered(pair: tuple[float, float]) -> None:
    """Refuse a pair whose second number is below the first."""
    if pair[0] > pair[1]:
        raise ValueError("two numbers, the second not below the first")


def filled(path: str) -> None:
    """Refuse an empty path, and what is no path."""
    file_path(path)
    if not path.strip():
        raise ValueError("a text that is not empty")


def schedule_form(text: str) -> None:
    """Refuse what cannot be a schedule, before there is a model to check it against."""
    if text != "published" and not re.fullmatch(SCHEDULE_FORM, text):
        raise ValueError(f"one of {SCHEDULES}")


def policy(text: str) -> None:
    """Refuse a policy such as rand-m9-mstd0.5-inc1 that timm would not carry out to the letter.

    Args:
        text: A family and parts, with hyphens between: a key with its number, or a set.

    Raises:
        ValueError: If it is not; the message names the part and what was expected.
    """
    family, *parts = text.split("-")
    if family not in _FAMILIES:
        raise ValueError(f"none or one of {', '.join(_FAMILIES)} in place of {family!r}")
    numbers: dict[str, float] = {}
    sets = [part for part in parts if family == "rand" and part in _SETS]
    for part in parts:
        if part not in sets:
            key, number = _read_part(family, part)
            if key in numbers:
                raise ValueError(f"{key} once")
            numbers[key] = number
    if len(sets) > 1:
        raise ValueError(f"one set of operations in place of {', '.join(sets)}")
    if sets and numbers.get("inc") == 0:
        raise ValueError(f"inc1 or no inc with {sets[0]}, whose operations all increase")
    _check_together(numbers, family=family, most=_SETS[sets[0]] if sets else None)


def _read_part(family: str, part: str) -> tuple[str, float]:
    # -> the key and its number
    keys = _FAMILIES[family]
    key = part.rstrip("0123456789.")
    if key not in keys:
        sets = f", or one of {', '.join(_SETS)}" if family == "rand" else ""
        raise ValueError(
            f"parts of {family}-* in place of {part!r}: {', '.join(keys)}, each with its number"
            f"{sets}; such as {family}-mstd0.5"
        )
    numeric, bounds = keys[key]
    form = r"\d{1,9}" if numeric is int else r"\d{1,9}(\.\d*)?"
    text = part.removeprefix(key)
    if not re.fullmatch(form, text) or float(text) not in bounds:
        kind = "whole number" if numeric is int else "number"
        raise ValueError(f"{key} with a {kind} of {bounds} in place of {part!r}")
    return key, float(text)


def _check_together(numbers: dict[str, float], *, family: str, most: int | None) -> None:
    limit, layers = numbers.get("mmax", _LIMIT), numbers.get("n", _LAYERS)
    magnitude = numbers.get("m", _LIMIT if family == "rand" else 0)
    if magnitude > limit:
        hint = f"; mmax{magnitude:g} beside it raises that limit" if family == "rand" else ""
        raise ValueError(f"a magnitude of at most {limit:g} in place of m{magnitude:g}{hint}")
    if most is not None and layers > most:
        raise ValueError(f"at most n{most} with weighted operations, of which none comes twice")
