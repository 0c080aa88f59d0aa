"""Values of JSON: how deep, how many, and how they are named where they do not fit."""

import pytest

from fambav.json_files import MAX_DEPTH, check, is_plain, parse, parse_object


def nested(depth):
    return "[" * depth + "1" + "]" * depth


def test_depth_is_limited_for_everyone():
    assert parse(nested(MAX_DEPTH), "x.json", "lists")
    for depth in (MAX_DEPTH + 1, 990, 200_000):
        with pytest.raises(ValueError, match=r"^x.json is damaged, expected lists: it is nested"):
            parse(nested(depth), "x.json", "lists")


def test_values_that_are_shared_or_hold_themselves_are_counted_and_not_followed_forever():
    bomb = ["x"] * 9
    for _ in range(20):
        bomb = [bomb] * 9
    cycle = {}
    cycle["again"] = cycle
    assert not is_plain(bomb, most=1000) and not is_plain(cycle)
    assert is_plain({"a": [1, 2.5, None, "b", True]}) and not is_plain({1: 2})


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff", "byte 0 is no UTF-8"),
        (b'{"a": 1e400}', "1e400 is a number beyond every float"),
        (b'{"a": 1' + b"0" * 400 + b"}", r"10*\.\.\. is a number beyond every float"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b"[1]", r"it is \[1\], no JSON object"),
        (b"{", "Expecting property name .* at character 1"),
    ],
)
def test_what_is_no_object_is_one_sentence(raw, reason):
    with pytest.raises(ValueError, match=f"^x is damaged, expected y: {reason}[^\n]*$"):
        parse_object(raw, "x", "y")
    assert parse_object(b'{"a": NaN}', "x", "y", constants=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rows": [{"n": 1}]}, "rows[0].n is 1, expected text or null"),
        ({"rows": [{}]}, "rows[0].n is missing, expected text or null"),
        ({"rows": {}}, "rows is {}, expected a list"),
        ({"rows": [], "by": {"a\n": "b"}}, "by['a\\n'] is 'b', expected a number"),
        ({"rows": [], "by": {"a": True}}, "by['a'] is True, expected a number"),
    ],
)
def test_the_first_part_that_differs_from_a_form_is_named(value, message):
    form = {"rows": [{"n": (str, type(None))}], "by": {str: float}}
    with pytest.raises(ValueError) as refusal:
        check({"by": {}, **value}, form, "x.json")
    assert str(refusal.value) == f"x.json: {message}"
