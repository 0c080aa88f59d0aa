"""What both ways of merging must never change, and where they differ."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fambav.layers import Tokens
from fambav.ops.match import evens_then_odds, in_order, match, others
from fambav.reduction import merge
from fambav.registry import REDUCERS
from tests import golden
from tests.reduction.made import agree, cosine, insert, pick, reduce, some

METHODS = ("famba-v", "ordered")

PLACES = {"head": (0,), "middle": (32,), "double": (0, 64), "none": ()}


@pytest.fixture(params=PLACES)
def tokens(request):
    return some(PLACES[request.param])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("counts", [(1,), (7,), (31,), (9, 8, 7, 6, 5)])
def test_merging_keeps_mass_and_class_tokens(tokens, method, counts):
    merged = reduce(tokens, method, *counts)
    assert merged.x.shape == merged.residual.shape == (3, 65 - sum(counts), 8)
    assert torch.equal(merged.size.sum(1), tokens.size.sum(1))
    assert pick(merged.x, merged.cls_index).equal(pick(tokens.x, tokens.cls_index))
    assert pick(merged.residual, merged.cls_index).equal(pick(tokens.residual, tokens.cls_index))
    assert merged.position.gather(1, merged.cls_index).equal(tokens.cls_index)
    assert (merged.size.gather(1, merged.cls_index) == 1).all()


@pytest.mark.parametrize("counts", [(1,), (31,), (9, 8, 7, 6, 5)])
def test_in_order_keeps_the_mean_over_patches_and_the_order(tokens, counts):
    merged = reduce(tokens, "ordered", *counts)
    for got, x in ((merged.x, tokens.x), (merged.residual, tokens.residual)):
        torch.testing.assert_close((got * merged.size[..., None]).mean(1) * got.shape[1], x.sum(1))
    assert (merged.position.diff(dim=1) > 0).all()


def test_the_paper_way_puts_odd_places_after_the_even_ones_that_are_left(tokens):
    position = reduce(tokens, "famba-v", 10).position
    even, odd = position.split((33 - 10, 32), dim=1)
    assert (even % 2 == 0).all()
    assert (even.diff(dim=1) > 0).all()
    assert odd.tolist() == [list(range(1, 65, 2))] * 3


def test_the_paper_way_counts_a_token_once_however_many_patches_it_stands_for():
    x = torch.tensor([[[1.0, 0], [1, 1], [1, 0], [1, 1]]])
    tokens = Tokens.start(x, cls_index=())._replace(size=torch.tensor([[1.0, 2, 5, 3]]))
    assert reduce(tokens, "famba-v", 2).x[0, 0].tolist() == [1, pytest.approx(1 / 3)]
    assert reduce(tokens, "ordered", 2).x[0, 0].tolist() == [1, pytest.approx(2 / 8)]
    for method in METHODS:
        assert reduce(tokens, method, 2).size.tolist() == [[8, 3]]


@pytest.mark.parametrize("method", METHODS)
def test_both_streams_are_merged_alike(method):
    tokens = some((32,))
    merged = reduce(tokens._replace(residual=2 * tokens.x), method, 9, 9)
    assert torch.equal(merged.residual, 2 * merged.x)


@pytest.mark.parametrize("method", METHODS)
def test_identical_neighbours_merge_first(tokens, method):
    x = tokens.x.clone()
    x[:, 11] = x[:, 10]
    merged = reduce(tokens._replace(x=x), method, 1)
    gone = [set(range(65)) - set(row) for row in merged.position.tolist()]
    assert gone in ([{10}] * 3, [{11}] * 3)
    assert merged.source[:, 10].equal(merged.source[:, 11])


@pytest.mark.parametrize("method", METHODS)
def test_similarity_ignores_length(method):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 4)
    x[:, 5] = 100 * torch.randn(2, 4)
    x[:, 3] = 0.01 * x[:, 2]
    position = reduce(Tokens.start(x, cls_index=()), method, 1).position
    assert [sorted(set(range(9)) - set(row)) for row in position.tolist()] == [[2], [2]]


@pytest.mark.parametrize("method", METHODS)
def test_gradient_reaches_every_token_of_both_streams(tokens, method):
    x, residual = tokens.x.requires_grad_(), tokens.residual.requires_grad_()
    merged = reduce(tokens._replace(x=x, residual=residual), method, 20, 10)
    (merged.x.square().sum() + merged.residual.square().sum()).backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    assert (residual.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_samples_do_not_see_each_other(tokens, method):
    order = torch.tensor([2, 0, 1])
    shuffled = Tokens(*(f[order] if isinstance(f, torch.Tensor) else f for f in tokens))
    together = reduce(tokens, method, 9, 9)
    for got, want in zip(reduce(shuffled, method, 9, 9), together, strict=True):
        same = torch.equal(got, want[order]) if isinstance(want, torch.Tensor) else got == want
        assert same


@pytest.mark.parametrize("method", METHODS)
def test_autocast_does_not_change_who_merges(method):
    tokens = some((32,))
    with torch.autocast("cpu", torch.bfloat16):
        within = reduce(tokens, method, 20)
    assert torch.equal(within.x, reduce(tokens, method, 20).x)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_merging_on_a_gpu_gives_the_same_bits_twice(method):
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    x = torch.randn(64, 197, 192, device="cuda", requires_grad=True)
    runs = []
    for _ in range(2):
        merged = reduce(Tokens.start(x, cls_index=(98,)), method, 90, 40)
        runs.append((merged.x, *torch.autograd.grad(merged.x.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_compared_in_float32(dtype):
    x = some((32,)).x.to(dtype)
    for mine, wide in zip(match(x, 30), match(x.float(), 30), strict=True):
        assert torch.equal(mine, wide)


def test_of_equal_scores_the_lower_place_wins():
    x = torch.tensor([1.0, 0]).expand(1, 9, 2)
    source, target = match(x, 3)
    assert source.tolist() == [[0, 2, 4]]
    assert target.tolist() == [[1, 1, 1]]
    source, target = match(x, 3, masked=torch.tensor([[1]]))
    assert source.tolist() == [[0, 2, 4]]
    assert target.tolist() == [[3, 3, 3]]


@pytest.mark.parametrize("method", METHODS)
def test_tokens_of_zeros_merge_without_nan(method):
    tokens = some((2,), length=9)
    x = tokens.x.clone()
    x[:, 5:] = 0
    merged = reduce(tokens._replace(x=x.requires_grad_()), method, 2, 2)
    merged.x.sum().backward()
    assert merged.x.isfinite().all()
    assert x.grad.isfinite().all()


def test_a_token_too_small_to_measure_wins_no_comparison():
    x = torch.tensor([[[1.0, 0.5], [1, 0.4], [1e-30, 1e-30]]])
    assert match(x, 1)[0].tolist() == [[0]]


def test_places_that_are_left_are_ascending():
    places = torch.tensor([[5, 0, 3], [1, 2, 0]])
    assert others(places, 7).tolist() == [[1, 2, 4, 6], [3, 4, 5, 6]]
    assert others(places[:, :0], 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert others(places, 6).dtype == torch.int64


AXES = [(0, 0, 0), (1, 0, 0), (-2, 0, 0), (0, 4, 0), (0, -0.5, 0), (0, 0, 8), (2, 0, 0)]


@st.composite
def tied(draw):
    """Features for two layers whose cosines are -1, 0 or 1 exactly: ties and zeros abound."""
    length = draw(st.integers(2, 12))
    rows = [draw(st.lists(st.sampled_from(AXES), min_size=length, max_size=length)) for _ in "ab"]
    places = draw(st.sampled_from([(), (0,), (length // 2,), (0, length - 1)]))
    return torch.tensor(rows, dtype=torch.float32)[:, None], places


@settings(deadline=None, derandomize=True, database=None)
@given(tied(), st.sampled_from(METHODS), st.integers(1, 6))
def test_merging_is_what_loops_over_a_list_would_do(drawn, method, most):
    features, places = drawn
    tokens = Tokens.start(features[0], cls_index=places, trace=True)
    for x in features:
        length, places = tokens.x.shape[1], tuple(tokens.cls_index[0].tolist())
        tokens = tokens._replace(x=x[:, :length])
        count = min(most, REDUCERS[method].limit(length, places))
        if count:
            merged = reduce(tokens, method, count)
            groups = by_hand(x[0, :length].tolist(), places, count, method)
            agree(merged, tokens, groups, tokens.size if method == "ordered" else None)
            tokens = merged


def by_hand(rows, cls_index, count, method):
    """Groups of places in their new order, the absorbing one first, written without tensors."""
    free = [p for p in range(len(rows)) if method == "famba-v" or p not in cls_index]
    even, odd = ([p for p in free[k::2] if p not in cls_index] for k in (0, 1))
    pairs = []
    for a in even:
        score, b = max((cosine(rows[a], rows[b]), -b) for b in odd)
        pairs.append((-score, a, -b))
    groups = {p: [p] for p in range(len(rows))}
    for _, a, b in sorted(pairs)[:count]:
        groups[b].append(a)
        del groups[a]
    order = (lambda p: (p % 2, p)) if method == "famba-v" else (lambda p: p)
    return [groups[p] for p in sorted(groups, key=order)]


MATCH, MATCH_CASES = golden.load("match")
ORDERED, ORDERED_CASES = golden.load("ordered")


@pytest.mark.parametrize("case", [c for c in MATCH_CASES["cases"] if c.startswith("match/")])
def test_the_paper_way_equals_the_official_matching(case):
    about = MATCH_CASES["cases"][case]
    length, count = about["t"], about["removed"]
    assert min(about["r"], REDUCERS["famba-v"].limit(length, (0,))) == count
    if count == 0:
        return
    metric = golden.hashed(f"match:{length}:metric", 2, length, 16)
    tokens = Tokens.start(golden.hashed(f"match:{length}:x", 2, length, 6), cls_index=(0,))
    selection = evens_then_odds(metric, count, tokens.cls_index)
    assert selection.keep.equal(MATCH[f"{case}/order"].long())
    official = torch.stack((MATCH[f"{case}/src"], MATCH[f"{case}/dst"]), dim=-1)
    assert pairs(selection) == [sorted(row) for row in official.tolist()]
    merged = merge(tokens, selection, torch.ones(2, length))
    torch.testing.assert_close(merged.x, MATCH[f"{case}/out"], atol=1e-6, rtol=0)


def pairs(selection):
    """Sorted [source, target] of each sample; the order of pairs among themselves is free."""
    return [sorted(r) for r in torch.stack((selection.source, selection.target), -1).tolist()]


def test_two_weighted_calls_in_a_row_equal_the_official_ones():
    tokens = Tokens.start(golden.hashed("match:13:x", 2, 13, 6), cls_index=(0,), trace=True)
    metric = golden.hashed("match:13:metric", 2, 13, 16)
    for step, count in ((1, 3), (2, 2)):
        selection = evens_then_odds(metric, count, tokens.cls_index)
        tokens = merge(tokens, selection, tokens.size)
        metric = tokens.x
        torch.testing.assert_close(tokens.x, MATCH[f"chain/x{step}"], atol=1e-6, rtol=0)
        assert tokens.size.equal(MATCH[f"chain/size{step}"][..., 0])
        members = tokens.source[:, None] == torch.arange(tokens.x.shape[1])[:, None]
        assert members.equal(MATCH[f"chain/source{step}"].bool())


@pytest.mark.parametrize("case", [c for c in ORDERED_CASES["cases"] if c.endswith("step1")])
def test_in_order_equals_the_official_merge_with_the_class_token_put_back_exactly(case):
    first = ORDERED_CASES["cases"][case]
    length = first["t_in"]
    places = torch.full((2, 1), first["cls_in"])
    tokens = Tokens.start(torch.zeros(2, length, 16), cls_index=(first["cls_in"],))
    for step, suffix in (("step1", ""), ("step2", "2")):
        about = case.removesuffix("step1") + step
        count = tokens.x.shape[1] - ORDERED_CASES["cases"][about]["t_out"]
        hidden, residual = (
            insert(f"rmeeto:{length}:{name}{suffix}", tokens.x.shape[1], tokens.cls_index)
            for name in ("hidden", "residual")
        )
        tokens = reduce(tokens._replace(x=hidden, residual=residual), "ordered", count)
        patches = others(tokens.cls_index, tokens.x.shape[1])
        for mine, name in ((tokens.x, "hidden"), (tokens.residual, "residual")):
            official = ORDERED[f"{about}/{name}"]
            torch.testing.assert_close(pick(mine, patches), official, atol=2e-6, rtol=0)
            cls = golden.hashed(f"rmeeto:{length}:{name}{suffix}_cls", 2, 1, 16)
            assert pick(mine, tokens.cls_index).equal(cls)
        assert tokens.size.gather(1, patches).equal(ORDERED[f"{about}/size"])
        assert tokens.cls_index[:, 0].equal(ORDERED[f"{about}/cls_exact"].long())
        anchor = ORDERED[f"{about}/anchor"].long()
        assert tokens.position.gather(1, patches).equal(anchor + (anchor >= places))


@pytest.mark.parametrize("name", ["src", "survivors"])
def test_in_order_chooses_the_official_pairs(name):
    for case in (c for c in ORDERED_CASES["cases"] if c.endswith("step1")):
        about = ORDERED_CASES["cases"][case]
        length, count = about["t_in"], about["t_in"] - about["t_out"]
        if count:
            hidden = golden.hashed(f"rmeeto:{length}:hidden", 2, length - 1, 16)
            selection = in_order(hidden, count, torch.empty(2, 0, dtype=torch.int64))
            mine = selection.keep if name == "survivors" else selection.source.sort().values
            assert mine.equal(ORDERED[f"{case}/{name}"].long().sort().values)
