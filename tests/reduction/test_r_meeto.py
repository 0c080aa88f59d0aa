"""R-MeeTo's merge against the official numbers, against loops, and in whole models."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fambav
import fambav.models
from fambav.layers import Tokens
from fambav.layers.tokens import Intermediates
from fambav.ops.match import others
from fambav.reduction import make_reducer, make_reduction
from tests import golden
from tests.reduction.made import (
    agree,
    body,
    cosine,
    insert,
    pick,
    reduce,
    some,
    twin_order,
)

STEPS, _ = golden.load("ordered")
VARIANTS, CASES = golden.load("rmeeto")
CASES = CASES["cases"]
ARRAYS = {**STEPS, **VARIANTS}
HOW = {
    "step": {},
    "unordered": dict(order="lost"),
    "prune": dict(merge="prune"),
    "l1": dict(distance="l1"),
    "l2": dict(distance="l2"),
}


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("step1")])
def test_two_steps_equal_the_official_ones(case):
    variant, sizes, _ = case.split("/")
    length, place = CASES[case]["t_in"], CASES[case]["cls_in"]
    tokens = Tokens.start(torch.zeros(2, length, 16), cls_index=(place,))
    for step, suffix in (("step1", ""), ("step2", "2")):
        about, arrays = CASES[f"{variant}/{sizes}/{step}"], f"{variant}/{sizes}/{step}"
        here = tokens.x.shape[1]
        assert here == about["t_in"]
        assert tokens.cls_index.tolist() == [[about["cls_in"]]] * 2
        hidden, residual = (
            insert(f"rmeeto:{length}:{name}{suffix}", here, tokens.cls_index)
            for name in ("hidden", "residual")
        )
        tokens = tokens._replace(x=hidden, residual=residual)
        if about["t_out"] < here:
            tokens = reduce(tokens, "r-meeto", here - about["t_out"], **HOW[variant])
        assert tokens.cls_index.tolist() == [[about["cls_out"]]] * 2
        patches = others(tokens.cls_index, tokens.x.shape[1])
        for mine, name in ((tokens.x, "hidden"), (tokens.residual, "residual")):
            official = ARRAYS[f"{arrays}/{name}"]
            torch.testing.assert_close(pick(mine, patches), official, atol=2e-6, rtol=0)
            cls = golden.hashed(f"rmeeto:{length}:{name}{suffix}_cls", 2, 1, 16)
            assert pick(mine, tokens.cls_index).equal(cls)
        assert tokens.size.gather(1, patches).equal(ARRAYS[f"{arrays}/size"])
        anchor = ARRAYS[f"{arrays}/anchor"].long()
        assert tokens.position.gather(1, patches).equal(anchor + (anchor >= place))


@pytest.mark.parametrize("variant", ["l1", "l2"])
def test_the_exact_policy_counts_the_patches_before_the_class_token(variant):
    tokens = Tokens.start(torch.zeros(2, 17, 16), cls_index=(8,))
    for step, suffix in (("step1", ""), ("step2", "2")):
        hidden = insert(f"rmeeto:17:hidden{suffix}", tokens.x.shape[1], tokens.cls_index)
        how = dict(class_policy="exact", distance=variant)
        tokens = reduce(tokens._replace(x=hidden), "r-meeto", 5, **how)
        official = ARRAYS[f"{variant}/t17_p8_r5/{step}/cls_exact"]
        assert tokens.cls_index[:, 0].equal(official.long())


@pytest.mark.parametrize("metric", ["B", "C", "delta"])
def test_intermediates_of_mixers_are_compared(metric):
    tokens = some((32,), length=65)
    found = torch.randn(3, 2, 65, 4)
    intermediates = Intermediates(torch.arange(65).expand(1, 2, 65), **{metric: found})
    how = dict(hook="after", metric=metric)
    merged = reduce(tokens._replace(intermediates=intermediates), "r-meeto", 9, **how)
    plain = reduce(Tokens.start(found.mean(1), cls_index=(32,), trace=True), "r-meeto", 9)
    assert merged.source.equal(plain.source)
    assert make_reducer("r-meeto", metric=metric).needs == {metric}


def test_the_nearest_by_any_distance_is_what_the_fast_way_finds():
    tokens = some((32,))
    fast = reduce(tokens, "r-meeto", 20)
    assert reduce(tokens, "r-meeto", 20, distance="l2").source.equal(fast.source)
    lost = reduce(tokens, "r-meeto", 20, order="lost")
    assert lost.position.sort().values.equal(fast.position.sort().values)
    torch.testing.assert_close(lost.x.sum(1), fast.x.sum(1))


def test_pruning_drops_what_merging_would_fold_in():
    tokens = some((32,))
    merged, pruned = (reduce(tokens, "r-meeto", 20, merge=merge) for merge in ("mean", "prune"))
    assert pruned.position.equal(merged.position)
    patches = pruned.position
    assert pruned.x.equal(pick(tokens.x, patches))
    assert (pruned.size == 1).all()
    assert (pruned.source == -1).sum(1).tolist() == [20] * 3


def test_every_second_patch_can_go_if_there_are_partners_enough():
    for length in range(1, 12):
        for places in [(), (0,), (length // 2,), (0, length - 1)][: 4 if length > 1 else 2]:
            tokens = Tokens.start(torch.randn(2, length, 4), cls_index=places, trace=True)
            patches = length - len(places)
            for nearest in (1, 2, 4):
                how = dict(nearest=nearest, class_policy="exact")
                limit = make_reducer("r-meeto", nearest=nearest).limit(length, places)
                assert limit == (math.ceil(patches / 2) if patches // 2 >= nearest else 0)
                if limit:
                    merged = reduce(tokens, "r-meeto", limit, **how)
                    assert merged.x.shape[1] == length - limit
                    assert [len(set(row)) for row in merged.source.tolist()] == [length - limit] * 2


ROWS = [(0, 0, 0), (1, 0, 0), (-2, 0, 0), (0, 4, 0), (0, -0.5, 0), (0, 0, 8), (2, 0, 0)]


@st.composite
def arguments(draw):
    """Tied features and options; l2 between rows of length 1 orders ties as cosines do."""
    length = draw(st.integers(3, 12))
    rows = draw(st.lists(st.sampled_from(ROWS), min_size=length, max_size=length))
    places = draw(st.sampled_from([(), (0,), (length // 2,), (length - 1,)]))
    options = dict(
        distance=draw(st.sampled_from(["cosine", "l1", "l2"])),
        nearest=draw(st.integers(1, 3)),
        order=draw(st.sampled_from(["kept", "lost"])),
        merge=draw(st.sampled_from(["mean", "prune"])),
        weighted=draw(st.booleans()),
    )
    policies = ["exact", "proportional"] if places and options["order"] == "kept" else ["exact"]
    return rows, places, options, draw(st.sampled_from(policies))


@settings(deadline=None, derandomize=True, database=None)
@given(arguments(), st.integers(1, 6))
def test_the_merge_is_what_loops_over_a_list_would_do(drawn, most):
    rows, places, options, policy = drawn
    x = torch.tensor([rows], dtype=torch.float32)
    sizes = torch.arange(1.0, len(rows) + 1)[None]
    tokens = Tokens.start(x, cls_index=places, trace=True)._replace(size=sizes)
    count = min(most, make_reducer("r-meeto", **options).limit(len(rows), places))
    if count:
        merged = reduce(tokens, "r-meeto", count, class_policy=policy, **options)
        groups = twin_order(by_hand(rows, places, count, options), places, policy, len(rows))
        agree(merged, tokens, groups, tokens.size if options["weighted"] else None)


def by_hand(rows, places, count, options):
    """Groups of places in their new order, the absorbing one first, written without tensors."""
    patches = [p for p in range(len(rows)) if p not in places]
    even, odd = patches[0::2], patches[1::2]
    pairs = []
    for a in even:
        ranking = sorted(odd, key=lambda b: (-like(rows[a], rows[b], options["distance"]), b))
        b = ranking[options["nearest"] - 1]
        pairs.append((-like(rows[a], rows[b], options["distance"]), a, b))
    pairs.sort()
    groups = {p: [p] for p in range(len(rows))}
    for _, a, b in pairs[:count]:
        del groups[a]
        groups[b] += [a] if options["merge"] == "mean" else []
    if options["order"] == "kept":
        return [groups[p] for p in sorted(groups)]
    left = [a for _, a, _ in pairs[count:]]
    out = [groups[p] for p in (*left, *odd)]
    for place in places:
        out.insert(place * len(left) // len(even), [place])
    return out


def like(a, b, distance):
    if distance == "cosine":
        return cosine(a, b)
    lengths = [sum(v * v for v in row) ** 0.5 or 1 for row in (a, b)]
    apart = [v / lengths[0] - w / lengths[1] for v, w in zip(a, b, strict=True)]
    total = sum(abs(d) if distance == "l1" else d * d for d in apart)
    return -(total if distance == "l1" else total**0.5)


@pytest.mark.parametrize(
    ("dim", "count", "final"), [(192, 5, 142), (384, 11, 76), (768, 11, 76), (256, None, None)]
)
def test_the_published_schedule_is_that_of_the_paper(dim, count, final):
    sizes = body(197, depth=24, cls_index=(98,), grid=(14, 14), dim=dim)
    if count is None:
        with pytest.raises(ValueError, match="r-meeto has none for vim of width 256 and depth 24"):
            make_reduction(sizes, "r-meeto")
        return
    schedule = make_reduction(sizes, "r-meeto").schedule
    assert schedule.counts == (0, 0, *(count, 0) * 11)
    assert schedule.final == final


def test_a_vim_runs_and_learns_with_it():
    torch.manual_seed(0)
    model = timm.create_model("vim_micro", num_classes=5).eval()
    images = torch.randn(2, 3, *model.img_size)
    unreduced = model(images)
    reduced = fambav.reduce(model, "r-meeto", "r:3")
    assert reduced.reduction.class_policy == "proportional"
    logits = reduced(images)
    assert logits.shape == (2, 5)
    assert not logits.equal(unreduced)
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for how in (dict(metric="delta"), dict(order="lost", distance="l1"), dict(merge="prune")):
        fambav.reduce(model, "r-meeto", "r:3@2-4", **how)
        assert model(images).isfinite().all()


def test_tokens_merge_at_the_input_of_a_block_ahead_of_the_sum():
    torch.manual_seed(0)
    model = timm.create_model("vim_micro", depth=4, num_classes=5).eval()
    fambav.reduce(model, "r-meeto", "r:5@3-4")
    images = torch.randn(2, 3, *model.img_size)
    tokens = model.embed(images)
    with torch.no_grad():
        for layer, block in enumerate(model.layers):
            if layer >= 2:
                tokens = reduce(tokens, "r-meeto", 5)
            tokens = block(tokens)
        assert model(images).equal(model.classify(tokens))


def test_the_published_schedule_runs_in_a_vim_of_that_size():
    torch.manual_seed(0)
    model = fambav.reduce(timm.create_model("vim_tiny").eval(), "r-meeto")
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 224, 224))
    assert logits.isfinite().all()


@pytest.mark.parametrize(("count", "places"), [(11, [92, 86]), (20, [88, 78])])
def test_the_class_token_goes_where_the_official_code_puts_it(count, places):
    tokens = some((98,), length=197, batch=2)
    for place in places:
        tokens = reduce(tokens, "r-meeto", count)
        assert tokens.cls_index.tolist() == [[place]] * 2


def test_it_runs_where_there_is_no_class_token():
    sizes = body(64, depth=2)
    assert make_reduction(sizes, "r-meeto", "r:3").class_policy == "exact"
