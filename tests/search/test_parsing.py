"""Budgets and families as users write them."""

import subprocess
import sys

import pytest

from fambav.search.parsing import Budget, Family, parse_budget, parse_family


def test_budgets_are_read():
    assert parse_budget("token-layers:0.7") == Budget("token-layers", 0.7)
    assert parse_budget("flops:.75") == Budget("flops", 0.75)
    assert parse_budget("ms:12.5") == Budget("ms", 12.5)


@pytest.mark.parametrize(
    "text",
    ["", "0.7", "tokens:0.7", "token-layers:", "flops:0", "flops:1", "flops:nan", "ms:-1", "ms:x"],
)
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="budget is"):
        parse_budget(text)


@pytest.mark.parametrize(
    "text", ["all", "interleaved", "upper:6", "lower:3", "r@3-23/2", "keep@5,10", "scale:0,4,8"]
)
def test_families_are_read_and_written_alike(text):
    assert parse_family(text).text == text


def test_a_family_is_taken_apart_at_its_first_mark():
    assert parse_family("upper:6") == Family("upper:6", "upper", "6")
    assert parse_family("keep@5,10") == Family("keep@5,10", "keep", "5,10")


@pytest.mark.parametrize(
    "text", ["", "uper:6", "upper", "upper@6", "all:3", "keep:5", "scale:", "scale:1,", "r@"]
)
def test_a_family_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="family is"):
        parse_family(text)


def test_a_mistake_in_a_flag_shows_before_torch_is_loaded():
    code = (
        "import sys, fambav.commands.search_plan, fambav.commands.tune;"
        "print([n for n in ('torch', 'numpy', 'timm') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
