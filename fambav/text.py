"""Names of any origin in lines for people."""

from __future__ import annotations

import re

# Control characters, line separators, marks that turn the direction of text, and surrogates, as
# which Python reads bytes that are no UTF-8.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return text as one line that no terminal takes for a command: ESC becomes `\x1b`."""
    return _UNPRINTABLE.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)
