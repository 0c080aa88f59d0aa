"""One value of one setting: where it came from, and how its text becomes a number."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

from fambav.config.option import Option
from fambav.registry import nearest

# A higher level wins.  RECORD is what a finished or older run says of itself.
DEFAULT, RECORD, BASE, FILE, COMMAND = range(5)
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class ConfigError(ValueError):
    """Settings that cannot be run as written."""


class Setting(NamedTuple):
    """A value and its origin.

    Attributes:
        value: The value, of the option's type.
        level: DEFAULT, RECORD, BASE, FILE or COMMAND.
        label: How to name it to the user, such as `--lr` or `FILE: lr`.
    """

    value: Any
    level: int
    label: str


def shown(value: Any) -> str:
    """Return a value as messages write it: one line, of bounded length."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse(label: str, value: Any, expected: str) -> NoReturn:
    """Raise the error that every wrong setting ends in.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(f"{label} is {shown(value)}, expected {expected}")


def from_text(option: Option, words: list[str], label: str) -> Any:
    """Return the value that the words after a flag stand for.

    Args:
        option: The setting.
        words: One word, or several for a list.
        label: The flag as it was typed.

    Raises:
        ConfigError: If it is of the wrong type, unknown or out of range.
    """
    if _is_unset(option, words[0]) and len(words) == 1:
        return None
    if option.kind is tuple:
        return checked(option, tuple(_number(float, word, label) for word in words), label)
    if option.kind in (int, float):
        return checked(option, _number(option.kind, words[0], label), label)
    return checked(option, words[0], label)


def from_data(option: Option, value: Any, label: str) -> Any:
    """Return the value that a YAML or Python object stands for.

    Args:
        option: The setting.
        value: What YAML made of it.
        label: `FILE: key`.

    Raises:
        ConfigError: If it is of the wrong type, unknown or out of range.
    """
    if option.optional and (value is None or _is_unset(option, str(value))):
        return None
    if option.kind is tuple:
        if not isinstance(value, list | tuple):
            refuse(label, value, "a list of numbers such as [0.9, 0.95]")
        return checked(option, tuple(_typed(float, item, label) for item in value), label)
    return checked(option, _typed(option.kind, value, label), label)


def checked(option: Option, value: Any, label: str) -> Any:
    """Return a value of the right type, under its canonical name.

    Raises:
        ConfigError: If it is unknown or out of range.
    """
    value = option.aliases.get(value, value) if option.aliases else value
    if option.choices and value not in option.names:
        known = ", ".join(option.names)
        hint = nearest(value, (*option.names, *option.aliases))
        hint = f"; {hint}" if hint.startswith("did you mean") else ""
        refuse(label, value, f"one of {known}{hint}" if len(option.names) > 1 else known)
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers if option.kind in (int, float, tuple) else ():
        if not math.isfinite(number):
            refuse(label, number, "a finite number")
        if number not in option.bounds:
            refuse(label, number, str(option.bounds))
    if option.length is not None and len(numbers) != option.length:
        refuse(label, value, f"{option.length} numbers")
    if option.check:
        try:
            option.check(value)
        except ValueError as error:
            refuse(label, value, str(error))
    return value


def _is_unset(option: Option, word: str) -> bool:
    """Whether a word leaves a setting open: "none", unless that is one of its own values."""
    return option.optional and word.lower() == "none" and "none" not in option.choices


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
    if kind is float and isinstance(value, str) and _is_number(value):
        hint = "; YAML needs a dot in 1.0e-3"
    elif kind is str and isinstance(value, bool):
        hint = "; YAML reads a bare yes, no, on or off as true or false: quote it"
    elif kind is str and value is not None:
        hint = "; quote it"
    refuse(label, value, f"{_KINDS[kind]}{hint}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
