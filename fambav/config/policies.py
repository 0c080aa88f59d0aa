"""Which augmentation policies timm has: `rand-m9-mstd0.5-inc1` and so on.

timm passes over a part that has no number, takes an unknown set of operations for the ordinary one
and cuts magnitudes off, each without a word; here they are refused.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fambav.config.option import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, PROBABILITY, Bounds


class _Key(NamedTuple):
    """What a number may be: whole or not, and in which range."""

    whole: bool
    bounds: Bounds


_WHOLE, _COUNT = _Key(whole=True, bounds=NATURAL), _Key(whole=True, bounds=COUNT)
_SWITCH = _Key(whole=True, bounds=Bounds(0, 1))
_MSTD = {"mstd": _Key(whole=False, bounds=NOT_NEGATIVE)}
_SHARE, _ALPHA = _Key(whole=False, bounds=PROBABILITY), _Key(whole=False, bounds=POSITIVE)
_FAMILIES: dict[str, dict[str, _Key]] = {
    "rand": {"m": _WHOLE, "n": _COUNT, "p": _SHARE, **_MSTD, "mmax": _COUNT, "inc": _SWITCH},
    "augmix": {"m": _WHOLE, "w": _COUNT, "d": _COUNT, "a": _ALPHA, "b": _SWITCH, **_MSTD},
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), _MSTD),
}
# Sets of operations, and how many of each may fall on one image: drawn by weight, none comes twice.
_SETS = {"tweights": 15, "t3a": None, "t3aw": 14}
_LIMIT = 10  # timm's largest magnitude without mmax, and that of rand without m
_LAYERS = 2  # timm's n


def policy(text: str) -> None:
    """Refuse what timm would not carry out to the letter.

    Args:
        text: A family and parts, with hyphens between: a key with its number, or a set.

    Raises:
        ValueError: If it is not that; says what was expected in place of which part.
    """
    family, *parts = text.split("-")
    if family not in _FAMILIES:
        raise ValueError(f"none or one of {', '.join(_FAMILIES)} in place of {family!r}")
    found: dict[str, float] = {}
    sets = [part for part in parts if family == "rand" and part in _SETS]
    for part in parts:
        if part not in sets:
            key, number = _read(family, part)
            if key in found:
                raise ValueError(f"{key} once")
            found[key] = number
    if len(sets) > 1:
        raise ValueError(f"one set of operations in place of {', '.join(sets)}")
    if sets and found.get("inc") == 0:
        raise ValueError(f"inc1 or no inc with {sets[0]}, whose operations all increase")
    _check(found, family=family, most=_SETS[sets[0]] if sets else None)


def _read(family: str, part: str) -> tuple[str, float]:
    """Return the key and the number of a part."""
    keys = _FAMILIES[family]
    key = part.rstrip("0123456789.")
    if key not in keys:
        sets = f", or one of {', '.join(_SETS)}" if family == "rand" else ""
        raise ValueError(
            f"parts of {family}-* in place of {part!r}: {', '.join(keys)}, each with its number"
            f"{sets}; such as {family}-mstd0.5"
        )
    whole, bounds = keys[key]
    form = r"\d{1,9}" if whole else r"\d{1,9}(\.\d*)?"
    text = part.removeprefix(key)
    if not re.fullmatch(form, text) or float(text) not in bounds:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{key} with a {kind} of {bounds} in place of {part!r}")
    return key, float(text)


def _check(found: dict[str, float], *, family: str, most: int | None) -> None:
    """Refuse numbers that exclude each other."""
    limit, layers = found.get("mmax", _LIMIT), found.get("n", _LAYERS)
    magnitude = found.get("m", _LIMIT if family == "rand" else 0)
    if magnitude > limit:
        hint = f"; mmax{magnitude:g} beside it raises that limit" if family == "rand" else ""
        raise ValueError(f"a magnitude of at most {limit:g} in place of m{magnitude:g}{hint}")
    if most is not None and layers > most:
        raise ValueError(f"at most n{most} with weighted operations, of which none comes twice")
