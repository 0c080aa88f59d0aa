"""One setting: its description, and the conversion of text or YAML to its value."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, get_args, get_type_hints

from fambav.registry import Registry, nearest
from fambav.short_repr import short_repr

# A higher level wins.  RECORD is what the files of a finished or older run hold.
DEFAULT, RECORD, BASE, FILE, COMMAND = range(5)
Affects = Literal["nothing", "speed", "result", "model"]
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class ConfigError(ValueError):
    """Settings that cannot be run as written."""


class Setting(NamedTuple):
    """A value and its origin."""

    value: Any
    level: int  # DEFAULT, RECORD, BASE, FILE or COMMAND
    label: str  # how to name it to the user, such as `--lr` or `FILE: lr`


class Bounds(NamedTuple):
    """An interval of numbers; `above` and `below` exclude its ends, infinite ones are open."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        """Whether a number lies in the interval."""
        if not isinstance(value, int | float):
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.above else 'at least'} {_digits(self.low)}"
        return low if self.high in (math.inf, LARGEST) else f"{low} and {self._upper}"

    def expected(self, value: float) -> str:
        """Say what a number outside should have been."""
        return self._upper if self.high == LARGEST and value > LARGEST else str(self)

    @property
    def _upper(self) -> str:
        return f"{'less than' if self.below else 'at most'} {_digits(self.high)}"


def _digits(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


LARGEST = 2**31 - 1  # of what is counted; no library below takes more everywhere
COUNT, NATURAL = Bounds(1, LARGEST), Bounds(0, LARGEST)
PIXELS, PROCESSES = Bounds(1, 2**15), Bounds(0, 1024)  # beyond any image side, and any machine
POSITIVE, NOT_NEGATIVE = Bounds(0, above=True), Bounds(0)
PROBABILITY, RATE = Bounds(0, 1), Bounds(0, 1, below=True)


class When(NamedTuple):
    """A condition without which a setting means nothing."""

    causes: str  # names of the settings that decide, separated by spaces
    holds: Callable[..., bool]  # takes their values, in this order
    why: str  # where it does not hold, the rest of "expected X ..."; {name} stands for a value


class Option(NamedTuple):
    """The description of a setting.

    It affects "nothing" if it names the location of files or what is printed, "speed" if a run may
    go on with another value (time, memory, handling of failures), "result" if it changes what is
    learnt, "model" if it changes what is built, or what images that reads.
    """

    text: str  # meaning and unit, for the help
    affects: Affects | None = None  # None: as its group
    when: tuple[When, ...] = ()
    otherwise: Any = None  # its value where `when` does not hold: the default, unless it is given
    off_value: Any = None  # one that changes nothing even there, and so is taken there too
    choices: tuple[str, ...] = ()  # names it may take; empty for any
    registry: Registry[Any] | None = None  # where users may have added further names
    aliases: dict[str, str] = {}  # noqa: RUF012  other spellings of those names, never changed
    bounds: Bounds = Bounds()
    length: int | None = None  # numbers wanted of a list, None for any
    check: Callable[[Any], None] | None = None  # raises ValueError with what was expected
    flag: str = ""  # the original one without its hyphens, if it is not the name with hyphens
    off: str = ""  # the original flag that switches a boolean off
    also: tuple[str, ...] = ()  # further flags that mean the same
    short: str = ""  # one with a single hyphen
    name: str = ""  # this and the rest are filled in from the field
    kind: type = str
    pair: bool = False  # whether two numbers may be given too, height and width
    optional: bool = False
    default: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that it may take, with those that users have registered."""
        added = self.registry.names() if self.registry else ()
        return tuple(dict.fromkeys((*self.choices, *added)))


def option(default: Any, text: str, *when: When, **rest: Any) -> Any:
    """Return a dataclass field with `default` that carries Option(text, when=when, **rest)."""
    known = Option(text, when=when, **{"otherwise": default, **rest})
    return field(default=default, metadata={"option": known})


def switch(text: str, *when: When, on: bool = False, **rest: Any) -> Any:
    """Return the field of a boolean, off unless `on`."""
    return option(on, text, *when, **rest)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Settings of one concern; `affects` is the default of its settings, `example` shows some."""

    affects: ClassVar[Affects] = "result"
    example: ClassVar[str]


def options_of(group: type[Group]) -> dict[str, Option]:
    """Return the options of a group by name, completed from its fields."""
    options, hints = {}, get_type_hints(group)
    for item in fields(group):
        name, inner = item.name, get_args(hints[item.name])
        optional = type(None) in inner
        kind = next(h for h in inner if h is not type(None)) if optional else hints[name]
        known: Option = item.metadata["option"]
        options[name] = known._replace(
            affects=known.affects or group.affects,
            flag=known.flag or name.replace("_", "-"),
            name=name,
            kind=getattr(kind, "__origin__", kind),  # tuple[float, ...] is a tuple
            pair=tuple[int, int] in inner,
            optional=optional,
            default=item.default,
        )
    return options


def format_value(value: Any) -> str:
    """Return a value as messages write it: one line, of bounded length."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return short_repr(list(value) if isinstance(value, tuple) else value)


def refuse(label: str, value: Any, expected: str) -> NoReturn:
    """Raise the ConfigError that every wrong setting ends in."""
    raise ConfigError(f"{label} is {format_value(value)}, expected {expected}")


def from_text(option: Option, words: list[str], label: str) -> Any:
    """Return the value that the words after a flag stand for: one, or several for a list."""
    if len(words) == 1 and _is_unset(option, words[0]):
        return None
    if option.kind is tuple:
        return _checked(option, tuple(_number(float, word, label) for word in words), label)
    if option.pair and len(words) > 1:
        return _checked(option, tuple(_number(int, word, label) for word in words), label)
    numeric = option.kind in (int, float)
    return _checked(option, _number(option.kind, words[0], label) if numeric else words[0], label)


def from_data(option: Option, value: Any, label: str) -> Any:
    """Return the value of a YAML or Python object."""
    if option.optional and (value is None or _is_unset(option, value)):
        return None
    several = isinstance(value, list | tuple)
    if option.kind is not tuple and not (option.pair and several):
        return _checked(option, _typed(option.kind, value, label), label)
    if not several:
        refuse(label, value, "a list of numbers such as [0.9, 0.95]")
    kind = int if option.pair else float
    return _checked(option, tuple(_typed(kind, item, label) for item in value), label)


def _checked(option: Option, value: Any, label: str) -> Any:
    """Return a value of the right type under its canonical name, if it is known and in range."""
    value = option.aliases.get(value, value) if option.aliases else value
    if option.choices and value not in option.names:
        known = ", ".join(option.names)
        hint = nearest(value, (*option.names, *option.aliases))
        hint = f"; {hint}" if hint.startswith("did you mean") else ""
        refuse(label, value, f"one of {known}{hint}" if len(option.names) > 1 else known)
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers if option.kind in (int, float, tuple) else ():
        if not abs(number) <= sys.float_info.max:  # also a whole number beyond every float
            refuse(label, number, "a finite number")
        if number not in option.bounds:
            refuse(label, number, option.bounds.expected(number))
    if option.length is not None and len(numbers) != option.length:
        refuse(label, value, f"{option.length} numbers")
    if option.pair and isinstance(value, tuple):
        if len(value) != 2:
            refuse(label, value, "one number, or two: height and width")
        value = value[0] if value[0] == value[1] else value
    if option.check:
        try:
            option.check(value)
        except ValueError as error:
            refuse(label, value, str(error))
    return value


def _is_unset(option: Option, value: Any) -> bool:
    """Whether a word leaves a setting open: "none", unless that is one of its own values."""
    if not option.optional or "none" in option.choices:
        return False
    return isinstance(value, str) and value.lower() == "none"


def _number(kind: type, word: str, label: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        refuse(label, word, _KINDS[kind])


def _typed(kind: type, value: Any, label: str) -> Any:
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            refuse(label, value, "a finite number")
    hint = ""
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            float(value)
            hint = "; YAML needs a dot in 1.0e-3"
    elif kind is str and isinstance(value, bool):
        hint = "; YAML reads a bare yes, no, on or off as true or false: quote it"
    elif kind is str and value is not None:
        hint = "; quote it"
    refuse(label, value, f"{_KINDS[kind]}{hint}")
