"""Tables in every form."""

import pytest

from fambav.table import FORMATS, Table

ROWS = (("all", "famba-v", "1.5"), ("all", "ordered", "12"), ("none", "-", "3"))
TABLE = dict(head=("strategy", "method", "s"), rows=ROWS, names=2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("notes", [(), ("seconds of one epoch",)])
def test_no_form_ends_in_a_line_break(form, notes):
    text = Table(**TABLE, notes=notes, values=[("s",), (1.5,)], document=[]).render(form)
    assert text == text.rstrip("\n")
    assert all(note in text for note in notes) or form in ("csv", "json")


def test_names_that_repeat_are_left_out_and_figures_stand_at_the_right():
    assert Table(**TABLE).render("text").splitlines() == [
        "strategy  method     s",
        "all       famba-v  1.5",
        "          ordered   12",
        "none      -          3",
    ]


def test_each_column_has_its_own_side():
    text = Table(head=("a", "bb"), rows=[("ccc", "d")], names=0, sides="><").render("text")
    assert text.splitlines() == ["  a  bb", "ccc  d"]
