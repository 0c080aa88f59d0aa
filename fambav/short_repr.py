"""A `repr` for messages: one line of bounded length, in bounded time whatever the value is."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

WIDTH = 80  # characters of the longest text
_BITS = 14_000  # of a whole number whose digits Python writes: it refuses more than 4300


class _Short(reprlib.Repr):
    """Looks at so many items of so many levels: lists may hold one another, or themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 20
        self.maxother = 10 * WIDTH

    def repr_str(self, text: str, level: int) -> str:
        return repr(text[: WIDTH + 1])

    def repr_bytes(self, raw: bytes, level: int) -> str:
        return repr(raw[: WIDTH + 1])

    def repr_int(self, number: int, level: int) -> str:
        if number.bit_length() <= _BITS:
            return repr(number)
        sign = "negative " if number < 0 else ""
        return f"a {sign}number of about {number.bit_length() * 0.30103:.0f} digits"

    def repr_instance(self, value: Any, level: int) -> str:
        if isinstance(value, Mapping):
            return self.repr_dict(dict(value), level)
        if isinstance(value, list | tuple):
            return self.repr_list(list(value), level)
        return super().repr_instance(value, level)

    def repr_Namespace(self, value: Any, level: int) -> str:
        return f"<{type(value).__name__}>"  # may hold anything, and its repr writes all of it


_SHORT = _Short()


def short_repr(value: Any) -> str:
    """Return `repr(value)` in one line, cut off behind 77 characters.

    Of nested containers three levels are written, of each the first 20 items.
    """
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
