"""Many plans at once, their scores, times and heuristic."""

import pytest
import torch

import fambav.models  # noqa: F401  registers the models
from fambav.engine.precision import Precision
from fambav.search.cost_models import Stopwatch
from fambav.search.greedy import merged_dissimilarity, pair_similarity
from fambav.search.objective import Objective, prefix_shared_logits
from fambav.search.space import Plan, SearchSpace
from fambav.timm_compat import timm

PRECISION = Precision(torch.device("cpu"), None)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = timm.create_model("vim_micro", img_size=32, patch_size=8, num_classes=10).eval()
    made.head.weight.data.mul_(50)
    return made


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


PLANS = [(0,) * 6, (0, 4, 0, 0, 0, 4), (0, 4, 0, 4, 0, 0), (0, 4, 0, 0, 0, 0), (0, 0, 0, 0, 4, 0)]


@pytest.mark.parametrize("method", ["ordered", "famba-v", "tome", "prune-aligned", "storm", "mtr"])
def test_plans_that_share_layers_give_the_logits_of_each_alone(net, images, method):
    space = SearchSpace(net.info, method)
    reductions = [space.reduction(counts) for counts in PLANS]
    found = prefix_shared_logits(net, images.split(4), reductions, PRECISION)
    before = net.reduction
    for reduction, logits in zip(reductions, found, strict=True):
        net.reduction = reduction
        with torch.no_grad():
            alone = torch.cat([net(batch) for batch in images.split(4)])
        torch.testing.assert_close(logits, alone, rtol=0, atol=0)
    net.reduction = before


def test_a_model_that_needs_positions_shares_layers_too(images):
    torch.manual_seed(0)
    net = timm.create_model("plainmamba_micro", img_size=32, num_classes=10).eval()
    space = SearchSpace(net.info, "ordered")
    plans = [(0,) * net.depth, (0, 4, *(0,) * (net.depth - 3), 4), (0, 4, *(0,) * (net.depth - 2))]
    reductions = [space.reduction(counts) for counts in plans]
    found = prefix_shared_logits(net, [images[:2]], reductions, PRECISION)
    for reduction, logits in zip(reductions, found, strict=True):
        net.reduction = reduction
        with torch.no_grad():
            torch.testing.assert_close(logits, net(images[:2]), rtol=0, atol=0)


def test_what_plans_share_is_computed_once(net, images):
    space, runs = SearchSpace(net.info, "ordered"), []
    handles = [
        layer.register_forward_hook(lambda *_, n=n: runs.append(n))
        for n, layer in enumerate(net.layers)
    ]
    reductions = [space.reduction(counts) for counts in (PLANS[1], PLANS[3], PLANS[3])]
    prefix_shared_logits(net, [images], reductions, PRECISION)
    for handle in handles:
        handle.remove()
    assert sorted(runs) == [0, 1, 2, 3, 4, 5, 5]


def test_the_model_keeps_its_own_reduction(net, images):
    before = net.reduction
    prefix_shared_logits(
        net, [images], [SearchSpace(net.info, "ordered").reduction(PLANS[1])], PRECISION
    )
    pair_similarity(net, images, PRECISION)
    assert net.reduction is before


def test_milliseconds_are_a_share_of_the_first_median(net, images, monkeypatch):
    rounds = iter([{0: [10, 20, 30], 1: [5, 5, 3]}, {0: [40, 40, 40], 1: [30, 20, 10]}])
    monkeypatch.setattr("fambav.search.cost_models.interleave", lambda *_, **__: next(rounds))
    stopwatch = Stopwatch(net, images, PRECISION)
    reductions = [SearchSpace(net.info, "ordered").reduction(PLANS[1])]
    assert stopwatch.times(reductions) == (20, [20 * 0.25])
    assert stopwatch.times(reductions) == (20, [20 * 0.5])


@pytest.mark.parametrize("objective", ["distance", "accuracy"])
def test_a_plan_is_evaluated_once_and_no_plan_is_no_distance(net, images, objective, monkeypatch):
    labels = torch.arange(6)
    given = dict(reference=net.reduction, precision=PRECISION)
    scorer = Objective(net, images, labels, kind=objective, **given)
    space = SearchSpace(net.info, "ordered")
    first = scorer.losses(space, PLANS[:3])
    monkeypatch.setattr(
        "fambav.search.objective.prefix_shared_logits", None
    )  # would fail if it were called
    assert scorer.losses(space, [PLANS[2], PLANS[0]]) == [first[2], first[0]]
    unreduced = scorer.scores[Plan("ordered", PLANS[0])]
    if objective == "distance":
        assert unreduced.loss == pytest.approx(0, abs=1e-9) and first[1] > 1e-3
    else:
        with torch.no_grad():
            logits = net(images).double()
        wrong = (logits.argmax(1) != labels).double().mean()
        sure = torch.nn.functional.cross_entropy(logits, labels) / 6
        assert unreduced.loss == pytest.approx(float(wrong + sure), rel=1e-5)


def test_a_model_trained_with_a_plan_is_at_no_distance_under_that_plan(net, images):
    space = SearchSpace(net.info, "ordered")
    given = dict(reference=space.reduction(PLANS[1]), precision=PRECISION)
    scorer = Objective(net, images, torch.arange(6), kind="distance", **given)
    unreduced, trained = scorer.losses(space, PLANS[:2])
    assert trained == pytest.approx(0, abs=1e-9) and unreduced > 1e-3


def test_patches_that_are_alike_have_a_double_at_the_first_layer(net, images):
    kept = net.pos_embed.data.clone()
    net.pos_embed.data.zero_()
    alike = pair_similarity(net, torch.ones_like(images), PRECISION)
    net.pos_embed.data.copy_(kept)
    assert [len(row) for row in alike] == [8] * 6
    torch.testing.assert_close(alike[0], torch.ones(8, dtype=torch.float64))
    other = pair_similarity(net, images, PRECISION)
    assert all((row.diff() <= 0).all() for row in other) and other[0].max() < 0.999


def test_a_step_looks_as_harmful_as_the_pairs_it_merges_are_unlike():
    alike = torch.tensor([[1.0, 0.5], [0.9, 0.2]], dtype=torch.float64)
    assert merged_dissimilarity(alike, (0, 0), (1, 0)) == 0
    assert merged_dissimilarity(alike, (1, 0), (2, 0)) == 0.5
    assert merged_dissimilarity(alike, (0, 1), (1, 0)) == pytest.approx(-0.1)
    assert merged_dissimilarity(alike, (0, 0), (3, 0)) == 1.5  # one more than there are pairs
