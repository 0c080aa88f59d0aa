"""Names in lines for people."""

import pytest

from fambav.text import printable


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a b~ \u00e9 \u00b1 \u6f22\u5b57 \U0001f600", None),
        ("a\nb\r\t", r"a\nb\r\t"),
        ("\x1b[31m\a\0\x7f\x9b", r"\x1b[31m\x07\x00\x7f\x9b"),
        ("a\u2028\u202eb\u200f\u2066", r"a\u2028\u202eb\u200f\u2066"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text, line):
    assert printable(text) == (text if line is None else line)
