"""Tokens of small steps join alike ones of middling steps."""

import pytest
import torch

from fambav.reduction import make_reducer, make_reduction, reduce
from fambav.registry import REDUCERS
from tests.reduction import made
from tests.reduction.scanned import IMAGES, dropped, scanned, vim


def stepping(steps, x, *, cls_index=()):
    """Tokens of one sample with these step sizes, the same in all channels of both directions."""
    delta = torch.tensor(steps).view(1, 1, -1, 1).expand(1, 2, -1, 6)
    tokens = scanned(len(steps), cls_index=cls_index, batch=1, delta=delta)
    return tokens._replace(x=x, residual=x.clone())


def test_the_score_is_the_mean_over_channels_summed_over_directions():
    delta = torch.tensor([[[[0.1, 0.1], [0.3, 0.5]], [[0.9, 0.9], [0.1, 0.1]]]])
    tokens = scanned(2, cls_index=(), batch=1, delta=delta)
    assert dropped(tokens, made.reduce(tokens, "mtr", 1)) == [[1]]  # 0.5 < 1.0


def test_sources_join_the_most_alike_of_the_next_larger_steps():
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [0.1, 1], [1, 0], [0, 1]]])
    tokens = stepping([6.0, 5, 3, 4, 1, 2], x)  # keep 0 and 1, targets 2 and 3, sources 4 and 5
    fewer = made.reduce(tokens, "mtr", 2, targets=1.0)
    assert fewer.position.tolist() == [[0, 1, 2, 3]]
    assert fewer.source.tolist() == [[0, 1, 2, 3, 2, 3]]
    torch.testing.assert_close(fewer.x[0, 2:], (x[0, 2:4] + x[0, 4:]) / 2)
    assert fewer.x[0, :2].equal(x[0, :2])
    wide = made.reduce(tokens, "mtr", 2)  # two targets each: 0 and 1 are exactly like them
    assert wide.source.tolist() == [[0, 1, 2, 3, 0, 1]]


def test_a_mean_counts_every_token_once():
    x = torch.tensor([[[1.0, 0], [3, 0], [5, 0]]])
    tokens = stepping([3.0, 2, 1], x)._replace(size=torch.tensor([[1.0, 7, 1]]))
    fewer = made.reduce(tokens, "mtr", 1, targets=1.0)
    assert fewer.x[0, 1].tolist() == [4, 0]
    assert fewer.size.tolist() == [[1, 8]]


@pytest.mark.parametrize(
    ("targets", "count", "pool"),
    [(2.0, 3, 6), (0.1, 3, 1), (1.5, 3, 5), (9.0, 3, 13), (0.1, 10, 1)],
)
def test_targets_are_rounded_up_and_all_that_are_left_at_most(targets, count, pool):
    delta = torch.arange(1.0, 17).view(1, 1, 16, 1).expand(1, 2, 16, 6)
    tokens = scanned(16, cls_index=(), batch=1, delta=delta)
    selection = make_reducer("mtr", targets=targets).select(tokens, count)
    assert selection.source.tolist() == [[*range(count - 1, -1, -1)]]
    assert selection.target.max() < count + pool
    x = torch.zeros(1, 16, 8)
    x[:, :count, 0] = x[:, count + pool - 1 :, 0] = 1
    selection = make_reducer("mtr", targets=targets).select(tokens._replace(x=x), count)
    assert selection.target.tolist() == [[count + pool - 1] * count]


@pytest.mark.parametrize("places", [(0,), (8,), (0, 16), ()])
def test_class_tokens_take_no_part_and_order_is_kept(places):
    delta = torch.rand(4, 2, 17, 6) + 0.1
    for place in places:
        delta[:, :, place] = 0
    tokens = scanned(17, cls_index=places, batch=4, delta=delta)
    most = REDUCERS["mtr"].limit(17, places)
    assert most == 16 - len(places)
    for count in (1, 7, most):
        fewer = made.reduce(tokens, "mtr", count)
        assert fewer.position.gather(1, fewer.cls_index).tolist() == [list(places)] * 4
        assert (fewer.position.diff(dim=1) > 0).all()
        assert fewer.size.sum(1).tolist() == [17] * 4
        for new in fewer.cls_index.unbind(1):
            assert fewer.size[torch.arange(4), new].tolist() == [1] * 4


def test_of_equal_steps_the_lower_place_is_kept():
    tokens = stepping([1.0] * 6, torch.ones(1, 6, 2))
    selection = make_reducer("mtr").select(tokens, 2)
    assert selection.source.tolist() == [[4, 5]]
    assert selection.target.tolist() == [[0, 0]]


@pytest.mark.parametrize("targets", [0.0, -1.0, float("nan"), float("inf")])
def test_a_number_of_targets_without_a_meaning_is_refused(targets):
    with pytest.raises(ValueError, match=r"option targets is .*, expected 0.001 or more"):
        make_reducer("mtr", targets=targets)


@pytest.mark.parametrize("scan", ["compact", "aligned", "masked"])
def test_a_model_runs_with_every_scan(scan):
    net = reduce(vim(), "mtr", "r:3@1,3", scan=scan)
    assert net.schedule.lengths == (17, 14, 14, 11)
    assert net(IMAGES).isfinite().all()


def test_there_is_no_published_schedule():
    with pytest.raises(ValueError, match="mtr has none for vim of width 384"):
        make_reduction(made.body(197, cls_index=(98,), depth=24, dim=384), "mtr")


def test_gradient_reaches_every_token_of_both_streams():
    tokens = scanned(17, cls_index=(8,))
    x, residual = (t.clone().requires_grad_() for t in (tokens.x, tokens.residual))
    fewer = made.reduce(tokens._replace(x=x, residual=residual), "mtr", 6)
    (fewer.x.square().sum() + fewer.residual.square().sum()).backward()
    assert (x.grad.abs().sum(2) > 0).all()
    assert (residual.grad.abs().sum(2) > 0).all()
