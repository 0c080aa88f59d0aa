"""Sequential merging against loops, and how far its protection reaches."""

from itertools import combinations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fambav
import fambav.models
from fambav.layers import Tokens
from fambav.reduction import make_reducer, make_reduction
from tests.reduction.made import agree, body, cosine, pick, reduce, some, twin_order

OPTIONS = [
    dict(neighbours=neighbours, radius=radius)
    for neighbours in ("both", "next")
    for radius in (0, 1, 2)
]


def arrangements(longest):
    for length in range(1, longest + 1):
        for k in range(min(length, 3)):
            yield from ((length, places) for places in combinations(range(length), k))


@pytest.mark.parametrize("radius", [0, 1, 4])
@pytest.mark.parametrize("policy", ["exact", "proportional", "middle"])
def test_tokens_near_the_class_token_are_what_they_were(radius, policy):
    tokens = some((32,))
    near = torch.arange(32 - radius, 33 + radius).expand(3, -1)
    merged = reduce(tokens, "stm", 10, radius=radius, class_policy=policy)
    now = merged.source.gather(1, near)
    assert pick(merged.x, now).equal(pick(tokens.x, near))
    assert (merged.size.gather(1, now) == 1).all()
    members = (merged.source[:, :, None] == now[:, None]).sum(1)
    assert (members == 1).all()


def test_only_neighbours_merge():
    merged = reduce(some((32,)), "stm", 20)
    for row in merged.source.tolist():
        assert row[:32] == sorted(row[:32])
        assert row[33:] == sorted(row[33:])
        assert max(row.count(place) for place in row) <= 3
    in_pairs = reduce(some((32,)), "stm", 20, neighbours="next")
    assert max(row.count(place) for row in in_pairs.source.tolist() for place in row) == 2


def test_the_mean_counts_patches_only_if_asked():
    x = torch.tensor([[[1.0, 0], [1, 1]]])
    tokens = Tokens.start(x, cls_index=())._replace(size=torch.tensor([[1.0, 3]]))
    assert reduce(tokens, "stm", 1).x[0, 0].tolist() == [1, 0.5]
    assert reduce(tokens, "stm", 1, weighted=True).x[0, 0].tolist() == [1, 0.75]
    assert reduce(tokens, "stm", 1).size.tolist() == [[4]]


@pytest.mark.parametrize("options", OPTIONS)
def test_no_more_and_no_fewer_tokens_than_the_limit_can_go(options):
    method = make_reducer("stm", **options)
    for length, places in arrangements(9):
        limit = method.limit(length, places)
        pairs = allowed(length, places, options)
        assert limit == len({a for a, _ in pairs})
        if limit:
            tokens = Tokens.start(torch.randn(2, length, 4), cls_index=places, trace=True)
            merged = reduce(tokens, "stm", limit, **options)
            assert [sorted(set(row)) for row in merged.source.tolist()] == [
                list(range(length - limit))
            ] * 2
            for row in merged.source.tolist():
                free = {p for pair in pairs for p in pair}
                assert all(row.count(row[p]) == 1 for p in range(length) if p not in free)


@pytest.mark.parametrize("options", OPTIONS)
def test_it_foresees_exactly_the_places_a_class_token_can_reach(options):
    method = make_reducer("stm", **options)
    for length, places in arrangements(8):
        movable = sorted({a for a, _ in allowed(length, places, options)})
        for count in range(1, method.limit(length, places) + 1):
            reached = set()
            for gone in combinations(movable, count):
                left = [p for p in range(length) if p not in gone]
                reached.add(tuple(left.index(p) for p in places))
            assert method.cls_index_after(length, places, count) == reached


def test_a_schedule_that_fits_whatever_the_images_is_accepted_and_no_larger_one():
    sizes = body(65, depth=4, cls_index=(32,))
    with pytest.raises(ValueError, match=r"expected at most 12; layer 1.*stm can remove 31"):
        make_reduction(sizes, "stm", 40)
    reduction = make_reduction(sizes, "stm", "list:31,14,5,1")
    for seed in range(20):
        torch.manual_seed(seed)
        tokens = Tokens.start(torch.randn(3, 65, 8), cls_index=(32,), trace=True)
        for layer in range(4):
            tokens = reduction(tokens, layer)
        assert tokens.x.shape == (3, 14, 8)
        members = (tokens.source[:, :, None] == tokens.cls_index[:, None]).sum(1)
        assert (members == 1).all()


ROWS = [(0, 0, 0), (1, 0, 0), (-2, 0, 0), (0, 4, 0), (0, -0.5, 0), (0, 0, 8), (2, 0, 0)]


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from(ROWS), min_size=2, max_size=12),
    st.sampled_from(["none", "head", "middle", "double"]),
    st.sampled_from(OPTIONS),
    st.booleans(),
    st.sampled_from(["exact", "proportional"]),
    st.integers(1, 6),
)
def test_the_merge_is_what_loops_over_a_list_would_do(rows, cls, options, weighted, policy, most):
    length = len(rows)
    places = dict(none=(), head=(0,), middle=(length // 2,), double=(0, length - 1))[cls]
    policy = policy if places else "exact"
    x = torch.tensor([rows], dtype=torch.float32)
    sizes = torch.arange(1.0, length + 1)[None]
    tokens = Tokens.start(x, cls_index=places, trace=True)._replace(size=sizes)
    count = min(most, make_reducer("stm", **options).limit(length, places))
    if count:
        how = dict(options, weighted=weighted, class_policy=policy)
        merged = reduce(tokens, "stm", count, **how)
        groups = twin_order(by_hand(rows, places, count, options), places, policy, length)
        agree(merged, tokens, groups, tokens.size if weighted else None)


def allowed(length, places, options):
    """Pairs of an even patch and an odd neighbour, as places."""
    patches = [p for p in range(length) if p not in places]
    free = [all(abs(p - c) > options["radius"] for c in places) for p in patches]
    steps = (1, -1) if options["neighbours"] == "both" else (1,)
    return [
        (patches[n], patches[n + step])
        for n in range(0, len(patches), 2)
        for step in steps
        if 0 <= n + step < len(patches) and free[n] and free[n + step]
    ]


def by_hand(rows, places, count, options):
    """Groups of places in their new order, the absorbing one first, written without tensors."""
    best = {}
    for a, b in allowed(len(rows), places, options):
        score = cosine(rows[a], rows[b])
        if a not in best or score > best[a][0]:
            best[a] = (score, b)
    groups = {p: [p] for p in range(len(rows))}
    for a in sorted(best, key=lambda a: (-best[a][0], a))[:count]:
        groups[best[a][1]].append(a)
        del groups[a]
    return [groups[p] for p in sorted(groups)]


def test_models_of_both_kinds_run_and_learn_with_it():
    torch.manual_seed(0)
    for name in ("vim_micro", "plainmamba_micro"):
        model = fambav.reduce(timm.create_model(name, num_classes=5), "stm", "r:3")
        logits = model(torch.randn(2, 3, *model.img_size))
        assert logits.shape == (2, 5)
        logits.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
