"""Arguments of public functions: a wrong one is refused by its name, before anything is done."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fambav.registry import nearest
from fambav.short_repr import short_repr

LARGEST = 2**24  # of a size: beyond it torch fails to allocate, or Python never ends
MOST_LAYERS = 10_000


def refusal(name: str, value: object, expected: str) -> ValueError:
    """Return the error that says what an argument is and what it should be."""
    return ValueError(f"{name} is {short_repr(value)}, expected {expected}")


def is_whole(value: object) -> bool:
    """Whether something is a whole number: an int or numpy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether something is a real number, which NaN is as well, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def instance(name: str, value: Any, kind: type, expected: str) -> None:
    """Refuse what is of another type.

    Raises:
        ValueError: If value is.
    """
    if not isinstance(value, kind):
        raise refusal(name, value, expected)


def whole(name: str, value: Any, *, least: int = 0, most: int = LARGEST) -> int:
    """Return a whole number from `least` to `most`.

    Raises:
        ValueError: If value is another.
    """
    if not is_whole(value):
        raise refusal(name, value, f"a whole number of at least {least}")
    if not least <= value <= most:
        raise refusal(name, value, f"at least {least}" if value < least else f"at most {most}")
    return int(value)


def probability(name: str, value: Any) -> float:
    """Return a probability of dropping something, at least 0 and less than 1.

    Raises:
        ValueError: If value is another.
    """
    if not is_number(value) or not 0 <= value < 1:
        raise refusal(name, value, "a number of at least 0 and less than 1")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return a bool.

    Raises:
        ValueError: If value is none, whatever its truth.
    """
    if not isinstance(value, bool):
        raise refusal(name, value, "True or False")
    return value


def flags(**values: Any) -> None:
    """Refuse arguments, by name, that are no bools.

    Raises:
        ValueError: If one of them is none, whatever its truth.
    """
    for name, value in values.items():
        flag(name, value)


def known_name(name: str, value: Any, known: Collection[str]) -> str:
    """Return one of some words.

    Raises:
        ValueError: If value is another.
    """
    if not isinstance(value, str) or value not in known:
        raise refusal(name, value, f"a known name; {nearest(value, known)}")
    return value


def file_path(name: str, value: Any) -> Path:
    """Return a path.

    Raises:
        ValueError: If value is no text and no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise refusal(name, value, "a path")
    return Path(value)


def file_paths(name: str, values: Any) -> list[Path]:
    """Return several paths.

    Raises:
        ValueError: If values is a single one, none, or anything else.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
        raise refusal(name, values, "a list of paths")
    return [file_path(name, value) for value in values]


def near_path(path: Path) -> str:
    """Return "; did you mean 'x'?" with the closest name beside what is missing of a path.

    It is empty if nothing is missing, or no name is close.
    """
    try:
        missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
        names = sorted(beside.name for beside in missing.parent.iterdir())
    except (OSError, StopIteration):
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1)
    if not close:
        return ""
    found = missing.parent / close[0]
    whole = found / path.relative_to(missing)
    return f"; did you mean {str(whole if whole.exists() else found)!r}?"


def check_folder(folder: Path) -> None:
    """Refuse a folder that could not be made or written to, before any work is done.

    Raises:
        ValueError: If it, or what it would be made in, is a file or read-only.
    """
    known = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    if not known.is_dir() or not os.access(known, os.W_OK):
        state = "can be written" if known.is_dir() else f"can be made: {str(known)!r} is a file"
        raise refusal("output_dir", str(folder), f"a folder that {state}")
