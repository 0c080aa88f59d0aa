"""Where tokens go, how many can go, and what is refused."""

import re
from itertools import combinations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fambav.models
from fambav.layers import Tokens
from fambav.reduction import from_fusion, plan, write_schedule
from fambav.registry import REDUCERS, STRATEGIES
from tests.reduction.made import reduce, reducing, schedule

METHODS = ("famba-v", "ordered")

VIM = dict(depth=24, start=197, cls_index=(0,))
LENGTHS = {
    ("none", None, 0): (197,) * 24,
    ("all", None, 7): tuple(range(190, 28, -7)),
    ("interleaved", None, 14): (197, *(n for n in range(183, 42, -14) for _ in range(2)), 29),
    ("upper", 6, 9): (*(197,) * 5, *range(188, 25, -9)),
    ("upper", 7, 9): (*(197,) * 6, *range(188, 34, -9)),
    ("lower", 19, 9): (*range(188, 25, -9), *(26,) * 5),
    ("lower", 18, 9): (*range(188, 34, -9), *(35,) * 6),
    ("upper", 4, 8): (*(197,) * 3, *range(189, 28, -8)),
}
SUMS = (4728, 2628, 2712, 3018, 3189, 2163, 2217, 2880)


@pytest.mark.parametrize("cls_index", [(), (0,), (98,), (0, 196)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("row", "total"), list(zip(LENGTHS, SUMS, strict=True)))
def test_published_plans_give_their_token_counts(row, total, method, cls_index):
    strategy, layer, count = row
    places = dict(VIM, cls_index=cls_index, method=method)
    made = schedule(strategy, count=count, layer=layer, **places)
    assert made.lengths == LENGTHS[row]
    assert made.removed == 197 - LENGTHS[row][-1]
    assert sum(made.lengths) == total
    assert made.share == total / 4728


@pytest.mark.parametrize(
    ("count", "layer", "removed"),
    [
        (15, 15, 150),
        (14, 14, 154),
        (13, 13, 156),
        (12, 12, 156),
        (12, 11, 168),
        (11, 10, 165),
        (10, 9, 160),
        (10, 8, 170),
        (9, 7, 162),
        (9, 6, 171),
        (8, 5, 160),
        (8, 4, 168),
        (7, 3, 154),
        (7, 2, 161),
    ],
)
def test_every_starting_layer_of_the_paper_is_possible(count, layer, removed):
    made = schedule("upper", count=count, layer=layer, **VIM)
    assert made.removed == removed
    assert made.lengths[: layer - 1] == (197,) * (layer - 1)
    assert made.lengths[layer - 1] == 197 - count


def test_strategies_choose_their_layers():
    assert plan("none", depth=5) == (0, 0, 0, 0, 0)
    assert plan("all", depth=5, count=2) == (2, 2, 2, 2, 2)
    assert plan("interleaved", depth=5, count=2) == (0, 2, 0, 2, 0)
    assert plan("lower", depth=5, count=2, layer=2) == (2, 2, 0, 0, 0)
    assert plan("upper", depth=5, count=2, layer=2) == (0, 2, 2, 2, 2)


def test_upper_from_the_first_and_lower_to_the_last_layer_are_all_layers():
    every = plan("all", depth=5, count=2)
    assert plan("upper", depth=5, count=2, layer=1) == every
    assert plan("lower", depth=5, count=2, layer=5) == every


def test_the_names_of_the_original_flags_are_understood():
    assert plan("no", depth=4) == plan("none", depth=4)
    assert plan("alternate", depth=4, count=1) == plan("interleaved", depth=4, count=1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(strategy="uper"), "fusion_strategy is 'uper'.*did you mean 'upper'"),
        (dict(strategy="upper"), "fusion_layer is None, expected 1 to 24"),
        (dict(strategy="upper", layer=0), "fusion_layer is 0, expected 1 to 24"),
        (dict(strategy="lower", layer=25), "fusion_layer is 25, expected 1 to 24"),
        (dict(strategy="all", layer=3), "fusion_layer is 3, expected none"),
        (dict(strategy="none", count=0, layer=3), "fusion_layer is 3, expected none"),
        (dict(strategy="all", count=0), "fusion_token is 0, expected at least 1"),
        (dict(strategy="all", count=-1), "fusion_token is -1, expected at least 1"),
        (dict(strategy="none"), "fusion_token is 8, expected 0"),
        (dict(strategy="no", count=-8), "fusion_token is -8, expected 0"),
        (dict(strategy="interleaved", depth=1), "expected one that removes tokens at depth 1"),
    ],
)
def test_a_wrong_strategy_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan(**dict(depth=24, count=8) | kwargs)


@pytest.mark.parametrize(
    ("fusion", "text"),
    [
        (dict(), None),
        (dict(strategy="no"), None),
        (dict(strategy="all", token=7), "all:7"),
        (dict(strategy="alternate", token=14), "interleaved:14"),
        (dict(strategy="lower", layer=19, token=9), "lower:19:9"),
        (dict(strategy="upper", layer=6, token=9), "upper:6:9"),
        (dict(plan="6:9,8:12"), "6:9,8:12"),
    ],
)
def test_a_fusion_is_a_schedule_like_others(fusion, text):
    assert from_fusion(depth=24, **fusion) == text
    if text is not None:
        net = timm.create_model("vim_tiny", **{f"fusion_{n}": v for n, v in fusion.items()})
        assert net.schedule == fambav.reduce(net, "famba-v", text).schedule
        again = fambav.reduce(net, "famba-v", write_schedule(net.schedule.counts))
        assert again.schedule == net.schedule


def test_a_free_plan_names_layers_and_counts():
    free = dict(depth=5, start=65, cls_index=(32,))
    assert schedule(plan="2:9, 4:12", **free).counts == (0, 9, 0, 12, 0)
    assert schedule(plan="5:1,1:3,2:0", **free).counts == (3, 0, 0, 0, 1)
    made = schedule(plan="2:9,4:12", depth=5, start=65, cls_index=(32,))
    assert made.lengths == (65, 56, 56, 44, 44)


@pytest.mark.parametrize("text", ["", "4", "4:", "4:9;5:9", "4:-1", "four:9", "4:9,", "4:1.5"])
def test_a_free_plan_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match=r"expected layer:count pairs such as 6:9,8:9"):
        from_fusion(plan=text, depth=24)


@pytest.mark.parametrize("text", ["0:9", "25:9", "4:9,4:3"])
def test_a_free_plan_names_each_layer_once_and_within_depth(text):
    with pytest.raises(ValueError, match="expected each layer once, from 1 to 24"):
        from_fusion(plan=text, depth=24)


def test_a_free_plan_that_removes_nothing_is_refused():
    with pytest.raises(ValueError, match="fusion_plan is '4:0,5:0', expected one that removes"):
        from_fusion(plan="4:0,5:0", depth=24)


@pytest.mark.parametrize("also", [dict(strategy="all"), dict(count=2), dict(layer=4)])
def test_a_free_plan_stands_alone(also):
    with pytest.raises(ValueError, match="expected none beside a strategy, layer or token count"):
        schedule(plan="4:9", **VIM, **also)


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"reduction is 'orderd'.*did you mean 'ordered'"):
        schedule("all", count=2, method="orderd", **VIM)


def test_too_many_tokens_are_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"fusion_token is 50, expected at most 8; layer 6") as no:
        schedule("upper", count=50, layer=4, **VIM)
    assert "has 197 - 100 = 97 tokens, of which famba-v can remove 48 without" in str(no.value)
    with pytest.raises(ValueError, match=r"expected at most 58 at layer 6; .* 197 - 80 = 117 tok"):
        schedule(plan="4:50,5:30,6:90", **VIM)


def test_three_tokens_around_a_class_token_lose_none_the_paper_way_and_one_in_order():
    around = dict(depth=1, start=3, cls_index=(1,), count=1)
    with pytest.raises(ValueError, match=r"expected at most 0; .* can remove 0 without touching"):
        schedule("all", **around)
    assert schedule("all", method="ordered", **around).lengths == (2,)


def test_the_limit_follows_the_class_token_wherever_it_may_have_gone():
    # place 2 of 6 becomes 0 or 1 of 5; with 1, an odd place, one more could go
    either = dict(depth=2, start=6, cls_index=(2,))
    assert schedule(plan="1:1,2:2", **either).lengths == (5, 3)
    with pytest.raises(ValueError, match=r"at most 2 at layer 2; layer 2 has 6 - 1 = 5 tokens"):
        schedule(plan="1:1,2:3", **either)
    # place 3 of 6, an odd one, becomes 2 of 4, an even one
    with pytest.raises(ValueError, match=r"at most 1 at layer 2; layer 2 has 6 - 2 = 4 tokens"):
        schedule(plan="1:2,2:2", depth=2, start=6, cls_index=(3,))


@pytest.mark.parametrize("method", METHODS)
def test_limits_are_those_of_a_class_token_at_the_head(method):
    limit = REDUCERS[method].limit
    for length in range(1, 30):
        official = (length - 1) // 2
        assert limit(length, (0,)) == (
            official if method == "famba-v" else length // 2 * (length > 2)
        )


def arrangements(longest):
    """Every length up to `longest` with every choice of none, one or two class tokens."""
    for length in range(1, longest + 1):
        for k in range(min(length, 3)):
            yield from ((length, places) for places in combinations(range(length), k))


@pytest.mark.parametrize("method", METHODS)
def test_no_more_and_no_fewer_tokens_than_the_limit_can_go(method):
    torch.manual_seed(0)
    for length, places in arrangements(9):
        x = torch.arange(2.0 * length * 4).cos().view(2, length, 4)
        tokens = Tokens.start(x, cls_index=places, trace=True)
        limit = REDUCERS[method].limit(length, places)
        if limit:
            assert spared(reduce(tokens, method, limit), tokens)
        try:
            more = reduce(tokens, method, limit + 1)
        except (RuntimeError, ValueError):
            continue  # there are not so many places at all
        assert not spared(more, tokens)


def spared(reduced, tokens):
    """Whether as many tokens as asked went, and each class token is alone and unchanged."""
    k = tokens.cls_index.shape[1]
    at = reduced.cls_index[..., None].expand(-1, -1, tokens.x.shape[2])
    was = tokens.cls_index[..., None].expand(-1, -1, tokens.x.shape[2])
    alone = (reduced.source[:, :, None] == reduced.cls_index[:, None, :]).sum(1).eq(1).all()
    members = [len(set(row)) for row in reduced.source.tolist()]
    whole = members == [reduced.x.shape[1]] * len(members)
    return bool(
        whole and alone and (k == 0 or reduced.x.gather(1, at).equal(tokens.x.gather(1, was)))
    )


def test_the_paper_way_foresees_exactly_the_places_a_class_token_can_reach():
    for length, places in arrangements(9):
        free = [p for p in range(0, length, 2) if p not in places]
        for count in range(1, REDUCERS["famba-v"].limit(length, places) + 1):
            reached = set()
            for gone in combinations(free, count):
                order = [p for p in range(0, length, 2) if p not in gone] + list(
                    range(1, length, 2)
                )
                reached.add(tuple(order.index(p) for p in places))
            assert REDUCERS["famba-v"].cls_index_after(length, places, count) == reached


@st.composite
def arguments(draw):
    """Arguments of `schedule` that may or may not be possible."""
    depth, start = draw(st.integers(2, 6)), draw(st.integers(2, 40))
    strategy = draw(st.sampled_from(STRATEGIES[1:]))
    cls_index = draw(st.sampled_from([(), (0,), (start // 2,), (0, start - 1)]))
    layer = draw(st.integers(1, depth)) if strategy in ("lower", "upper") else None
    return dict(
        strategy=strategy,
        depth=depth,
        start=start,
        cls_index=cls_index,
        count=draw(st.integers(1, 12)),
        layer=layer,
        method=draw(st.sampled_from(METHODS)),
    )


@settings(deadline=None, derandomize=True, database=None)
@given(arguments(), st.integers(0, 2**32))
def test_a_schedule_is_what_happens_and_the_advice_in_a_refusal_works(wanted, seed):
    try:
        made = schedule(**wanted)
    except ValueError as refusal:
        most = int(re.search(r"expected at most (\d+);", str(refusal)).group(1))
        assert most < wanted["count"]
        if most == 0:
            return
        made = schedule(**wanted | dict(count=most))
        with pytest.raises(ValueError, match=f"expected at most {most};"):
            schedule(**wanted | dict(count=most + 1))
    x = torch.randn(3, made.start, 4, generator=torch.Generator().manual_seed(seed))
    start = tokens = Tokens.start(x, cls_index=wanted["cls_index"], trace=True)
    reduction = reducing(wanted["method"], made.counts, start)
    for layer, length in enumerate(made.lengths):
        tokens = reduction(tokens, layer)
        assert tokens.x.shape == (3, length, 4)
        assert spared(tokens, start)


def test_the_table_shows_every_layer_that_removes_tokens():
    made = schedule("upper", depth=6, start=65, cls_index=(32,), count=12, layer=3)
    assert made.table() == (
        "  layer  tokens in  removed  tokens out\n"
        "    1-2         65        -          65\n"
        "      3         65       12          53\n"
        "      4         53       12          41\n"
        "      5         41       12          29\n"
        "      6         29       12          17\n"
        "total removed: 48 of 65 tokens\n"
        "share of token-layers left: 69.2% (270 of 390)"
    )


@pytest.mark.parametrize("class_token", ["middle", "head", "double", "none"])
def test_a_plan_that_no_image_so_small_has_room_for_names_two_that_work(class_token):
    def counted(**changes):
        plan = dict(fusion_strategy="upper", fusion_layer=6, fusion_token=9)
        given = dict(img_size=64, class_token=class_token, **plan)
        return timm.create_model("vim_tiny", **{**given, **changes}).schedule.removed

    with pytest.raises(ValueError, match="fusion_token is 9, expected at most 0; ") as caught:
        counted()
    form = r"19 layers cannot share .* from layer (\d+) on, all fit from images of (\d+) x"
    said = re.search(form, str(caught.value))
    layer, side = map(int, said.groups())
    assert counted(fusion_layer=layer, fusion_token=1) == 25 - layer
    assert counted(img_size=16 * side) == 171
    for less in (dict(fusion_layer=layer - 1, fusion_token=1), dict(img_size=16 * (side - 1))):
        with pytest.raises(ValueError, match="fusion_token is"):
            counted(**less)


def test_a_schedule_of_equal_counts_names_the_largest_that_fits_at_all_its_layers():
    with pytest.raises(ValueError, match="is 'r:9@6-24', expected at most 3; layer") as caught:
        reduce_tiny("r:9@6-24")
    assert "cannot share" not in str(caught.value)
    assert reduce_tiny("r:3@6-24").schedule.removed == 57


def reduce_tiny(text):
    net = timm.create_model("vim_tiny", img_size=128, num_classes=1)
    return fambav.reduce(net, "ordered", text)
