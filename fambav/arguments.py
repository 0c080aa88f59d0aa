"""Arguments of public functions: a wrong one is refused by its name, before anything is done."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from fambav.short_repr import short_repr


def is_whole(value: object) -> bool:
    """Whether something is a whole number: an int or numpy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: Any, *, least: int) -> int:
    """Return a whole number that is at least `least`.

    Raises:
        ValueError: If value is another.
    """
    if not is_whole(value) or value < least:
        raise ValueError(
            f"{name} is {short_repr(value)}, expected a whole number of at least {least}"
        )
    return int(value)


def rate(name: str, value: Any) -> float:
    """Return a probability of dropping something, at least 0 and less than 1.

    Raises:
        ValueError: If value is another.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(
            f"{name} is {short_repr(value)}, expected a number of at least 0 and less than 1"
        )
    return float(value)
