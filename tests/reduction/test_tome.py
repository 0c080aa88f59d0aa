"""ToMe's merge: Famba-V's pairs at another point of the block, with other weights."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fambav
import fambav.models
from fambav.layers import Tokens
from fambav.reduction import make_reducer, make_reduction
from tests.reduction.made import agree, body, cosine, reduce, some


def test_it_makes_the_pairs_of_famba_v_and_counts_their_patches():
    tokens = some((32,))
    ours, paper = (reduce(tokens, method, 12, 7) for method in ("tome", "famba-v"))
    assert reduce(tokens, "tome", 12).source.equal(reduce(tokens, "famba-v", 12).source)
    assert ours.size.sum(1).tolist() == paper.size.sum(1).tolist() == [65] * 3
    torch.testing.assert_close(
        (ours.x * ours.size[..., None]).sum(1), tokens.x.sum(1), atol=1e-5, rtol=0
    )


def test_it_removes_at_the_input_of_a_block_and_loses_the_order():
    method = make_reducer("tome")
    assert (method.hook, method.ordered, method.weighted) == ("before", False, True)
    with pytest.raises(ValueError, match="expected 'compact' with tome, which loses order"):
        make_reduction(body(65, depth=2, cls_index=(32,)), "tome", 3, scan="aligned")


def test_its_limits_are_those_of_famba_v():
    tome, paper = make_reducer("tome"), make_reducer("famba-v")
    for length in range(1, 12):
        for places in ((), (0,), (length // 2,)):
            limit = tome.limit(length, places)
            assert limit == paper.limit(length, places)
            for count in range(1, limit + 1):
                assert tome.cls_index_after(length, places, count) == paper.cls_index_after(
                    length, places, count
                )


def test_the_ramp_of_its_paper_goes_from_twice_the_mean_to_nothing():
    ramp = make_reduction(body(197, depth=12, cls_index=(0,)), "tome", "ramp:8,-1").schedule
    assert ramp.counts[0] == 16
    assert ramp.counts[-1] == 0
    with pytest.raises(ValueError, match="tome has none for vim"):
        make_reduction(body(197, depth=12, cls_index=(0,)), "tome")


ROWS = [(0, 0, 0), (1, 0, 0), (-2, 0, 0), (0, 4, 0), (0, -0.5, 0), (0, 0, 8), (2, 0, 0)]


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from(ROWS), min_size=2, max_size=12),
    st.sampled_from(["none", "head", "middle", "double"]),
    st.integers(1, 6),
)
def test_the_merge_is_what_loops_over_a_list_would_do(rows, class_token, most):
    last = len(rows) - 1
    places = dict(none=(), head=(0,), middle=(len(rows) // 2,), double=(0, last))[class_token]
    x = torch.tensor([rows], dtype=torch.float32)
    sizes = torch.arange(1.0, len(rows) + 1)[None]
    tokens = Tokens.start(x, cls_index=places, trace=True)._replace(size=sizes)
    count = min(most, make_reducer("tome").limit(len(rows), places))
    if count:
        agree(reduce(tokens, "tome", count), tokens, by_hand(rows, places, count), tokens.size)


def by_hand(rows, places, count):
    """Groups of places in their new order, the absorbing one first, written without tensors."""
    pairs = []
    for a in range(0, len(rows), 2):
        if a not in places:
            odd = [b for b in range(1, len(rows), 2) if b not in places]
            b = min(odd, key=lambda b: (-cosine(rows[a], rows[b]), b))
            pairs.append((-cosine(rows[a], rows[b]), a, b))
    groups = {p: [p] for p in range(len(rows))}
    for _, a, b in sorted(pairs)[:count]:
        groups[b].append(a)
        del groups[a]
    return [groups[p] for p in sorted(groups, key=lambda p: (p % 2, p))]


def test_a_vim_runs_and_learns_with_it():
    torch.manual_seed(0)
    model = fambav.reduce(timm.create_model("vim_micro", num_classes=5), "tome", "r:3")
    logits = model(torch.randn(2, 3, *model.img_size))
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
