"""Names, and what to say about a wrong one."""

import subprocess
import sys

import pytest

from fambav.registry import DATA_SETS, MODELS, Registry, nearest


def test_names_are_checked_without_torch():
    code = "import sys, fambav.registry; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_published_model_has_both_spellings():
    short = {name for name in MODELS if name.endswith("midclstok_div2")}
    long = {name for name in MODELS if name.endswith("middle_cls_token_div2")}
    assert {n.replace("midclstok", "middle_cls_token") for n in short} == long
    assert len(short) == 5
    others = {name for name in MODELS if name.startswith("vim_")} - short - long
    assert others == {"vim_tiny", "vim_small", "vim_base", "vim_micro"}


@pytest.mark.parametrize(("wrong", "right"), [("cifar", "CIFAR"), ("DIGIT", "DIGITS")])
def test_a_misspelt_name_is_answered_with_the_nearest(wrong, right):
    assert nearest(wrong, DATA_SETS) == f"did you mean {right!r}?"


def test_a_name_near_nothing_is_answered_with_all():
    assert nearest("xyz", ("a", "b")) == "known: a, b"


def test_a_name_is_taken_once():
    table = Registry("thing")
    table.register("one")(int)
    assert table["one"] is int
    assert table.names() == ["one"]
    with pytest.raises(ValueError, match="thing is 'one', expected a name that is not taken"):
        table.register("one")(str)
    with pytest.raises(ValueError, match="did you mean 'one'"):
        table["onne"]
