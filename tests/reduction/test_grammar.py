"""How schedules are written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fambav.config import ConfigError, parse
from fambav.reduction import Schedule, parse_schedule
from tests.reduction.made import body


def counts(text, depth=24, start=197, classes=1):
    return parse_schedule(text, body(start, depth=depth, cls_index=range(classes)))


def at(layers, count, depth=24):
    return tuple(count if n in layers else 0 for n in range(1, depth + 1))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("r:5", (5,) * 24),
        ("r:5@3-23/2", at(range(3, 24, 2), 5)),
        ("r:11@5,10-12", at((5, 10, 11, 12), 11)),
        ("list:7,7,0,9", (7, 7, 0, 9, *(0,) * 20)),
        ("4:9,2:7,3:0", (0, 7, 0, 9, *(0,) * 20)),
        ("all:7", (7,) * 24),
        ("interleaved:7", at(range(2, 25, 2), 7)),
        ("alternate:7", at(range(2, 25, 2), 7)),
        ("lower:4:7", at(range(1, 5), 7)),
        ("upper:20:7", at(range(20, 25), 7)),
        ("keep:0.8@10,20", (*at((10,), 39)[:19], 31, 0, 0, 0, 0)),
        ("keep:0.5,0.25@2,3", (0, 98, 73, *(0,) * 21)),
        ("tokens:157,125,101@5,10,15", (*at((5,), 40)[:9], 32, 0, 0, 0, 0, 24, *(0,) * 9)),
        (" r:5@ 3 , 4".strip(), at((3, 4), 5)),
    ],
)
def test_a_schedule_means_tokens_removed_at_each_layer(text, wanted):
    assert counts(text) == wanted


def test_a_ramp_falls_or_rises_in_equal_steps_as_published():
    assert counts("ramp:16,-1", depth=12) == (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)
    assert counts("ramp:16,0", depth=12) == (16,) * 12
    assert counts("ramp:4,1", depth=5) == (0, 2, 4, 6, 8)
    assert counts("ramp:3,-1@2,6", depth=6) == (0, 6, 0, 0, 0, 0)


def test_shares_are_of_the_patches_that_are_left_and_rounded_up():
    gone = counts("keep:0.8@5,10,15")
    assert [196 - sum(gone[:n]) for n in (5, 10, 15)] == [157, 126, 101]
    assert counts("keep:0.3@1", depth=2, start=10, classes=0) == (7, 0)  # 0.3 * 10 is no 3.0000004


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "one of r:5"),
        ("5", "one of r:5"),
        ("x:5", "one of r:5"),
        ("published", "one of r:5"),
        ("r:", "one of r:5"),
        ("r:-5", "one of r:5"),
        ("r:5.5", "one of r:5"),
        ("r:5,6", "one number of tokens"),
        ("r:0", "one that removes tokens"),
        ("keep:1@3", "one that removes tokens"),
        ("r:5@", "layers such as"),
        ("r:5@3-", "layers such as"),
        ("r:5@3-9/0", "layers such as"),
        ("r:5@9-3", "layers from 1 to 24"),
        ("r:5@0", "layers from 1 to 24"),
        ("r:5@3,25", "layers from 1 to 24"),
        ("r:5@1-999999999", "layers from 1 to 24"),
        ("r:5@1-9999999999", "numbers of at most 9 digits"),
        ("r:5@10,5", "ascending layers"),
        ("r:5@5,5", "ascending layers"),
        ("list:5@3", "one of r:5"),
        ("none", "one of r:5"),
        ("4:9;5:9", "one of r:5"),
        ("4:0", "one that removes tokens"),
        ("4:9,4:3", "each layer once, from 1 to 24"),
        ("25:9", "each layer once, from 1 to 24"),
        ("all", "all:tokens"),
        ("interleaved:2:7", "interleaved:tokens"),
        ("lower:7", "lower:layer:tokens"),
        ("upper:0:7", "upper:layer:tokens"),
        ("upper:25:7", "a layer from 1 to 24"),
        ("list:" + "1," * 24 + "1", "at most 24 numbers"),
        ("ramp:16", "two numbers"),
        ("ramp:16,2", "a whole number of tokens and a slope"),
        ("ramp:1.5,0", "a whole number of tokens and a slope"),
        ("keep:0@3", "shares of more than 0 and at most 1"),
        ("keep:1.2@3", "shares of more than 0 and at most 1"),
        ("keep:-0.5@3", "shares of more than 0 and at most 1"),
        ("keep:0.5,0.5@3", "one share, or one for each layer"),
        ("tokens:150@3,4", "as many lengths as layers"),
        ("tokens:150,160@3,4", "lengths that do not grow"),
        ("tokens:198@3", "lengths that do not grow"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_in_one_line(text, expected):
    with pytest.raises(ValueError, match=r"^reduction_schedule is ") as refusal:
        counts(text)
    assert f"expected {expected}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        *("r:5", "r:5@3-23/2", "ramp:16,-1", "list:7,7,0", "6:9,8:12", "keep:0.8@5,10"),
        *("tokens:157,125@10,20", "upper:6:9", "lower:19:9", "all:7", "alternate:14", "published"),
    ],
)
def test_every_form_is_taken_by_the_command_line(text):
    config = parse(["--model", "vim_tiny", "--reduction", "evit", "--reduction-schedule", text])
    assert config.reduction.reduction_schedule == text


@pytest.mark.parametrize("text", ["upper", "upper:6:", "6:9,", "r5", "uper:6:9", "all:7@3"])
def test_what_cannot_be_a_schedule_is_refused_before_there_is_a_model(text):
    with pytest.raises(ConfigError, match=r"--reduction-schedule is .*, expected one of r:5"):
        parse(["--model", "vim_tiny", "--reduction", "evit", "--reduction-schedule", text])


def test_a_misspelt_form_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'upper'"):
        counts("uper:6:9")


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.text(alphabet="rkeptokensamplist:@,-/.0123456789 ", max_size=20)
    | st.from_regex(r"\A(r|ramp|list|keep|tokens):[0-9.,-]{1,8}(@[0-9,/-]{1,8})?\Z")
    | st.from_regex(r"\A(all|interleaved|lower|upper|[0-9]):[0-9:,]{1,8}\Z")
)
def test_any_text_is_a_schedule_or_refused(text):
    try:
        found = counts(text)
    except ValueError as refusal:
        assert str(refusal).startswith("reduction_schedule is ")
    else:
        assert len(found) == 24
        assert min(found) >= 0
        assert max(found) > 0


def test_lengths_are_what_mixers_see_before_or_after_tokens_go():
    before = Schedule.of(10, (0, 3, 2))
    after = Schedule.of(10, (0, 3, 2), after=True)
    assert (before.lengths, before.final) == ((10, 7, 5), 5)
    assert (after.lengths, after.final) == ((10, 10, 7), 5)
    assert after.table() == (
        "  layer  tokens in  removed  tokens out\n"
        "      1         10        -          10\n"
        "      2         10        3           7\n"
        "      3          7        2           5\n"
        "total removed: 5 of 10 tokens, after the mixer of their layer\n"
        "share of token-layers left: 90.0% (27 of 30)"
    )
