"""Some are pruned and some merged: whom a link joins, which stream hears of it."""

import pytest
import torch

from fambav.layers import Tokens
from fambav.reduction import make_reducer, make_reduction, reduce
from fambav.registry import REDUCERS
from tests.reduction import made
from tests.reduction.scanned import IMAGES, dropped, scanned, vim


def scored(x, score, *, cls_index=(), residual=None):
    """Tokens whose importance is `score` in each sample."""
    mixed = torch.tensor(score)[..., None].expand(len(x), -1, 1)
    tokens = scanned(x.shape[1], cls_index=cls_index, batch=len(x), mixed=mixed)
    return tokens._replace(x=x, residual=x.clone() if residual is None else residual)


def test_the_less_important_half_joins_the_most_alike_of_the_rest():
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 0.2], [-1, 0], [0.1, 1], [-1, 0.5]]])
    score = [[6.0, 5, 1, 4, 2, 3]]  # 2, 4 and 5 are less important
    fewer = made.reduce(scored(x, score), "utrc", 3, prune_share=0.0)
    assert fewer.position.tolist() == [[0, 1, 3]]
    assert fewer.source.tolist() == [[0, 1, 0, 2, 1, 2]]
    torch.testing.assert_close(fewer.x[0], (x[0, [0, 1, 3]] + x[0, [2, 4, 5]]) / 2)
    assert fewer.size.tolist() == [[2, 2, 2]]
    two = made.reduce(scored(x, score), "utrc", 2, prune_share=0.0)
    assert dropped(scored(x, score), two) == [[2, 4]]  # the weakest link is not carried out


def test_pruned_tokens_are_the_least_important_of_those_that_go_and_only_x_is_without_them():
    x = torch.randn(3, 12, 8)
    residual = torch.randn(3, 12, 8)
    torch.manual_seed(1)
    score = torch.rand(3, 12) + 0.1
    tokens = scored(x, score.tolist(), residual=residual)
    fewer = made.reduce(tokens, "utrc", 4)
    for sample, gone in enumerate(dropped(tokens, fewer)):
        pruned = sorted(gone, key=score[sample].tolist().__getitem__)[:2]
        for place, position in enumerate(fewer.position[sample].tolist()):
            joined = [p for p in gone if fewer.source[sample, p] == place]
            heard = [p for p in joined if p not in pruned]
            torch.testing.assert_close(
                fewer.x[sample, place], x[sample, [position, *heard]].mean(0)
            )
            everyone = residual[sample, [position, *joined]].mean(0)
            torch.testing.assert_close(fewer.residual[sample, place], everyone)
            assert fewer.size[sample, place] == 1 + len(joined)


@pytest.mark.parametrize(
    ("share", "count", "silent"), [(0.5, 1, 0), (0.5, 3, 1), (0.5, 4, 2), (1.0, 5, 5), (0.2, 4, 1)]
)
def test_the_number_that_is_pruned_is_rounded_halves_down(share, count, silent):
    selection = make_reducer("utrc", prune_share=share).select(scanned(12), count)
    assert selection.silent.sum(1).tolist() == [silent] * 2


def test_sizes_do_not_weigh_a_mean():
    x = torch.tensor([[[1.0, 0], [1, 0.1], [-1, 0]]])
    tokens = scored(x, [[3.0, 1, 2]])._replace(size=torch.tensor([[9.0, 1, 1]]))
    fewer = made.reduce(tokens, "utrc", 1, prune_share=0.0)
    torch.testing.assert_close(fewer.x[0, 0], x[0, :2].mean(0))
    assert fewer.size.tolist() == [[10, 1]]


@pytest.mark.parametrize("places", [(0,), (8,), (0, 16), ()])
def test_class_tokens_take_no_part_and_order_is_kept(places):
    mixed = torch.rand(4, 17, 8)
    for place in places:
        mixed[:, place] = -1
    tokens = scanned(17, cls_index=places, batch=4, mixed=mixed)
    for count in (1, 5, (17 - len(places)) // 2):
        fewer = made.reduce(tokens, "utrc", count)
        assert fewer.position.gather(1, fewer.cls_index).tolist() == [list(places)] * 4
        assert (fewer.position.diff(dim=1) > 0).all()
        assert fewer.size.sum(1).tolist() == [17] * 4
        for old, new in zip(places, fewer.cls_index.unbind(1), strict=True):
            assert fewer.x[torch.arange(4), new].equal(tokens.x[:, old])
            assert fewer.size[torch.arange(4), new].tolist() == [1] * 4


@pytest.mark.parametrize(("length", "places", "most"), [(17, (8,), 8), (18, (8,), 8), (1, (0,), 0)])
def test_no_more_than_the_less_important_half_can_go(length, places, most):
    assert REDUCERS["utrc"].limit(length, places) == most


def test_of_equal_links_and_partners_the_lower_places_win():
    x = torch.ones(1, 6, 2)
    selection = make_reducer("utrc").select(scored(x, [[1.0] * 6]), 2)
    assert selection.source.tolist() == [[3, 4]]
    assert selection.target.tolist() == [[0, 0]]
    assert selection.silent.tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prune_share=1.5), "option prune_share is 1.5, expected 0 to 1"),
        (dict(prune_share=-0.1), "option prune_share is -0.1, expected 0 to 1"),
        (dict(prune_share=float("nan")), "option prune_share is nan, expected 0 to 1"),
        (dict(signal="x"), "option signal is 'x', expected a known name"),
    ],
)
def test_options_without_a_meaning_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make_reducer("utrc", **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("signal", ["mixed", "gated", "ungated"])
@pytest.mark.parametrize("scan", ["compact", "aligned", "masked"])
def test_a_model_runs_with_every_signal_and_scan(signal, scan):
    net = reduce(vim(), "utrc", "r:3@1,3", signal=signal, scan=scan)
    assert net.schedule.lengths == (17, 14, 14, 11)
    assert net(IMAGES).isfinite().all()


def test_there_is_no_published_schedule_for_images():
    with pytest.raises(ValueError, match="utrc has none for vim of width 192"):
        make_reduction(made.body(197, cls_index=(98,), depth=24, dim=192), "utrc")


def test_gradients_reach_both_streams_except_pruned_tokens_of_x():
    tokens = scanned(17, cls_index=(8,))
    x, residual = (t.clone().requires_grad_() for t in (tokens.x, tokens.residual))
    given = tokens._replace(x=x, residual=residual)
    selection = make_reducer("utrc").select(given, 4)
    fewer = made.reduce(given, "utrc", 4)
    assert isinstance(fewer, Tokens)
    (fewer.x.square().sum() + fewer.residual.square().sum()).backward()
    assert (residual.grad.abs().sum(2) > 0).all()
    still = (x.grad.abs().sum(2) == 0).nonzero().tolist()
    pruned = [
        [n, p] for n in range(2) for p in sorted(selection.source[n, selection.silent[n]].tolist())
    ]
    assert still == pruned
