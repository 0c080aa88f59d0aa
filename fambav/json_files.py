"""JSON that a disk, an editor or another program may have spoiled: one sentence names the file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fambav.short_repr import short_repr

# What a value has to be: a type (float takes whole numbers too), a list of one form for each entry,
# a dictionary of forms by name or, under `str`, for whatever names, or a tuple of alternatives.
Form = Any

MAX_DEPTH = 32
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "values by name",
    type(None): "null",
}


def parse(raw: bytes | str, where: object, expected: str, *, constants: bool = False) -> Any:
    """Parse JSON.

    Args:
        raw: UTF-8, or text.
        where: The file, and what of it, as messages name it.
        expected: What it should be.
        constants: Take NaN and Infinity, which Python writes and JSON does not have.

    Raises:
        ValueError: If it is no JSON, is nested more than MAX_DEPTH deep, or has a number that no
            float holds.
    """
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        constant = float if constants else _refuse_constant
        value = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=constant)
        deep = not is_plain(value)
    except RecursionError:
        deep = True
    except UnicodeDecodeError as error:
        raise _damaged(where, expected, f"byte {error.start} is no UTF-8") from None
    except json.JSONDecodeError as error:
        raise _damaged(where, expected, f"{error.msg} at character {error.pos}") from None
    except ValueError as error:
        raise _damaged(where, expected, str(error)) from None
    if deep:
        raise _damaged(where, expected, f"it is nested more than {MAX_DEPTH} deep")
    return value


def parse_object(raw: bytes | str, where: object, expected: str, **more: bool) -> dict[str, Any]:
    """Do what `parse` does for a JSON object.

    Raises:
        ValueError: As there, or if it is no object.
    """
    value = parse(raw, where, expected, **more)
    if type(value) is not dict:
        raise _damaged(where, expected, f"it is {short_repr(value)}, no JSON object")
    return value


def read_object(path: Path, expected: str, form: Form = dict) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        expected: What it should be, in words.
        form: What the object has to hold.

    Raises:
        ValueError: As from `parse_object` and `check`.
        OSError: If the file cannot be read.
    """
    value = parse_object(path.read_bytes(), path, expected)
    check(value, form, path)
    return value


def check(value: Any, form: Form, where: object) -> None:
    """Refuse a value that has not the form, by the first part that differs.

    Raises:
        ValueError: If there is one; the message begins with `where`.
    """
    if problem := misfit(value, form):
        raise ValueError(f"{where}{':' * problem.startswith(('.', '['))} {problem.lstrip('. ')}")


def misfit(value: Any, form: Form) -> str:
    """Describe the first part of a value that differs from a form; empty if there is none."""
    kind = type(value)
    if isinstance(form, list) and kind is list:
        parts = ((f"[{n}]", own, form[0]) for n, own in enumerate(value))
    elif isinstance(form, dict) and kind is dict:
        if str in form:
            parts = ((f"[{short_repr(name)}]", own, form[str]) for name, own in value.items())
        elif missing := next((name for name in form if name not in value), None):
            return f".{missing} is missing, expected {_words(form[missing])}"
        else:
            parts = ((f".{name}", value[name], own) for name, own in form.items())
    elif isinstance(form, tuple):
        fits = any(not misfit(value, own) for own in form)
        return "" if fits else f" is {short_repr(value)}, expected {_words(form)}"
    else:
        fits = kind is form or (form is float and kind is int)
        return "" if fits else f" is {short_repr(value)}, expected {_words(form)}"
    for name, own, wanted in parts:
        if problem := misfit(own, wanted):
            return name + problem
    return ""


def is_plain(value: Any, *, most: float = math.inf, largest: float = math.inf) -> bool:
    """Return whether a value could stand in a JSON file, MAX_DEPTH deep at most.

    Args:
        value: Anything; it may contain itself.
        most: How many values it may hold at each depth, those met twice counted twice.
        largest: Size of the largest whole number in it.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if not all(_is_value(own, largest) for own in level):
            return False
        inner = chain.from_iterable(map(_inside, level))
        level = list(inner if most == math.inf else islice(inner, int(most) + 1))
        if not level:
            return True
        if len(level) > most:
            return False
    return False


def _is_value(value: Any, largest: float) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) for name in value)
    if isinstance(value, int):
        return abs(value) <= largest
    return value is None or isinstance(value, str | float | list | tuple)


def _inside(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _words(form: Form) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_words, form))
    return _WORDS[form if isinstance(form, type) else type(form)]


def _int(text: str) -> int:
    return int(text if len(text) < sys.float_info.max_10_exp else _finite(text))


def _float(text: str) -> float:
    return float(_finite(text))


def _finite(text: str) -> str:
    if abs(float(text)) <= sys.float_info.max:
        return text
    raise ValueError(f"{text[:20]}{'...' * (len(text) > 20)} is a number beyond every float")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no finite number")


def _damaged(where: object, expected: str, reason: str) -> ValueError:
    return ValueError(f"{where} is damaged, expected {expected}: {reason}")
