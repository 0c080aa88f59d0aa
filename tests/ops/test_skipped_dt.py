"""Step sizes of removed tokens: counted, estimated and carried to the kept token behind them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fambav.ops.scan_aligned import carry_skipped_dt, count_skipped, estimate_skipped_dt
from tests.ops.agreement import draw
from tests.ops.kept import at, in_order, some_places

DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["fwd", "bwd"])


def test_tokens_gone_are_counted_from_their_places():
    position = torch.tensor([[1, 2, 6, 9], [0, 3, 4, 5]])
    assert count_skipped(position).tolist() == [[0, 0, 3, 2], [0, 2, 0, 0]]
    assert count_skipped(position, reverse=True).tolist() == [[0, 3, 2, 0], [2, 0, 0, 0]]
    assert count_skipped(position[:, :1]).tolist() == [[0], [0]]
    assert count_skipped(position).dtype == torch.int64


@pytest.mark.parametrize("policy", ["bias", "hold_prev", "self"])
def test_estimated_steps_are_float32_whatever_the_tokens_are(policy):
    delta = draw("delta", 2, 4, 3, dtype=torch.bfloat16).exp()
    gone = torch.tensor([[0, 1, 7, 0]] * 2)
    steps = estimate_skipped_dt(policy, delta=delta, skipped=gone, bias=draw("bias", 3))
    assert steps.dtype == torch.float32
    if policy == "self":
        assert steps.equal(delta.float() * gone[..., None])


def test_a_policy_that_estimates_nothing_or_does_not_exist_is_refused():
    given = dict(delta=torch.ones(1, 2, 3), skipped=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="give aligned_scan those that the tokens carry"):
        estimate_skipped_dt("cached", **given)
    with pytest.raises(ValueError, match=r"policy is 'holdprev'.*did you mean 'hold_prev'"):
        estimate_skipped_dt("holdprev", **given)
    with pytest.raises(ValueError, match="bias is None, expected"):
        estimate_skipped_dt("bias", **given)
    with pytest.raises(ValueError, match="bias has shape"):
        estimate_skipped_dt("bias", **given, bias=torch.zeros(2))
    with pytest.raises(ValueError, match="skipped has shape"):
        estimate_skipped_dt("self", **given | dict(skipped=torch.zeros(1, 3)))


@DIRECTIONS
def test_two_prunes_are_one_prune_to_the_final_set(reverse):
    delta = draw("delta", 2, 20, 3, dtype=torch.float64).exp()
    first = some_places(2, 20, 12, "first")
    second = some_places(2, 12, 5, "second")
    once = carry_skipped_dt(delta, None, first.gather(1, second), in_order(20, reverse=reverse))
    gap = carry_skipped_dt(delta, None, first, in_order(20, reverse=reverse))
    twice = carry_skipped_dt(at(delta, first), gap, second, in_order(12, reverse=reverse))
    rest = slice(0, -1) if reverse else slice(1, None)
    torch.testing.assert_close(twice[:, rest], once[:, rest], rtol=1e-13, atol=1e-13)


def by_hand(delta, gap, keep, order):
    """What `carry_skipped_dt` says, one token after another, of one sample."""
    out = torch.zeros(len(keep), delta.shape[1], dtype=delta.dtype)
    carried, started = torch.zeros_like(delta[0]), False
    for place in order.tolist():
        if place in keep.tolist():
            out[keep.tolist().index(place)] = gap[place] + carried
            carried, started = torch.zeros_like(carried), True
        elif started:
            carried = carried + delta[place] + gap[place]
    return out


@st.composite
def prunes(draw):
    """Tokens that stay in any new order, and any order of the scan."""
    length, batch = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    kept, orders = draw(st.integers(1, length)), draw(st.sampled_from([1, batch]))
    places = st.permutations(range(length))
    keep = [draw(places)[:kept] for _ in range(batch)]
    order = [draw(places) for _ in range(orders)]
    return torch.tensor(keep), torch.tensor(order)


@settings(deadline=None)
@given(prunes(), st.booleans())
def test_steps_are_handed_over_as_a_walk_along_the_scan_would(places, nested):
    keep, order = places
    batch, length = len(keep), order.shape[1]
    delta = draw("delta", batch, length, 2, dtype=torch.float64).detach().exp().requires_grad_()
    gap = draw("gap", batch, length, 2, dtype=torch.float64).detach().abs().requires_grad_()
    got = carry_skipped_dt(delta, gap if nested else None, keep, order)
    own = gap if nested else torch.zeros_like(delta)
    samples = zip(delta, own, keep, order.expand(batch, -1), strict=True)
    want = torch.stack([by_hand(*sample) for sample in samples])
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    if want.requires_grad:
        leaves = [delta, gap] if nested else [delta]
        weight = draw("weight", *want.shape).detach().double()
        mine, theirs = (
            torch.autograd.grad(y, leaves, weight, materialize_grads=True) for y in (got, want)
        )
        assert all(map(torch.equal, mine, theirs))


def test_many_small_steps_after_large_ones_are_summed_without_loss():
    delta = torch.full((1, 1000, 1), 1e-3)
    delta[:, 1:500] = 1e4
    keep = torch.tensor([[0, 500, 999]])
    gap = carry_skipped_dt(delta, None, keep, in_order(1000, reverse=False))
    torch.testing.assert_close(gap[0, :, 0], torch.tensor([0, 499e4, 0.498]), rtol=1e-5, atol=0)


def test_steps_handed_over_are_float32_and_equal_from_run_to_run():
    delta = draw("delta", 2, 50, 3, dtype=torch.bfloat16).exp()
    keep = some_places(2, 50, 7)
    gaps = [carry_skipped_dt(delta, None, keep, in_order(50, reverse=True)) for _ in range(2)]
    assert gaps[0].dtype == torch.float32
    assert gaps[0].equal(gaps[1])


def test_places_that_do_not_fit_the_steps_are_named():
    delta, keep, order = torch.ones(2, 5, 3), torch.tensor([[0, 1]] * 2), torch.arange(5)[None]
    with pytest.raises(ValueError, match="skipped_dt has shape"):
        carry_skipped_dt(delta, delta[:, 1:], keep, order)
    with pytest.raises(ValueError, match="keep has shape"):
        carry_skipped_dt(delta, None, keep[:1], order)
    with pytest.raises(ValueError, match="order has shape"):
        carry_skipped_dt(delta, None, keep, order[:, 1:])
    with pytest.raises(ValueError, match="order has shape"):
        carry_skipped_dt(delta, None, keep, order.expand(3, 5))
