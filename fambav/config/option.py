"""What is known of a setting: its meaning, its names, its range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple

from fambav.registry import Registry


class Bounds(NamedTuple):
    """An interval of numbers; infinite ends are open.

    Attributes:
        low: Smallest value.
        high: Largest value.
        above: Whether low itself is excluded.
        below: Whether high itself is excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        """Tell whether a finite number lies in the interval."""
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.above else 'at least'} {self.low:g}"
        high = f"{'less than' if self.below else 'at most'} {self.high:g}"
        return low if self.high == math.inf else f"{low} and {high}"


COUNT, NATURAL = Bounds(1), Bounds(0)
POSITIVE, NOT_NEGATIVE = Bounds(0, above=True), Bounds(0)
PROBABILITY, RATE = Bounds(0, 1), Bounds(0, 1, below=True)


class Option(NamedTuple):
    """What is known of a setting besides its value.

    Attributes:
        text: Meaning and unit, for the help.
        choices: Names it may take; empty for any.
        registry: Where users may have added further names.
        aliases: Other spellings of those names.
        bounds: Interval a number must lie in.
        length: Numbers wanted of a list, None for any.
        check: Raises ValueError for further conditions, with what was expected as its text.
        flag: The original flag, without its hyphens, where it is not the name with hyphens.
        off: The original flag that switches it off, for a boolean.
        also: Further flags that mean the same.
        name, kind, optional, default: Filled in from the field.
    """

    text: str
    choices: tuple[str, ...] = ()
    registry: Registry[Any] | None = None
    aliases: dict[str, str] = {}  # noqa: RUF012  (a NamedTuple's default is never changed)
    bounds: Bounds = Bounds()
    length: int | None = None
    check: Callable[[Any], None] | None = None
    flag: str = ""
    off: str = ""
    also: tuple[str, ...] = ()
    name: str = ""
    kind: type = str
    optional: bool = False
    default: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names it may take now."""
        added = self.registry.names() if self.registry else ()
        return tuple(dict.fromkeys((*self.choices, *added)))


def option(default: Any, text: str, **rest: Any) -> Any:
    """Return a dataclass field with `default` that carries Option(text, **rest)."""
    return field(default=default, metadata={"option": Option(text, **rest)})
