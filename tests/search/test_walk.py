"""Many plans at once, and what is said of them."""

import pytest
import torch

import fambav.models  # noqa: F401  registers the models
from fambav.ecosystem import timm
from fambav.engine.precision import Precision
from fambav.search.judge import Judge
from fambav.search.price import Clock
from fambav.search.similarity import similarity, unlikeness
from fambav.search.space import Plan, Space
from fambav.search.walk import logits

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
def test_plans_that_share_layers_say_what_each_says_alone(net, images, method):
    space = Space(net.info, method)
    reductions = [space.reduction(counts) for counts in PLANS]
    found = logits(net, images.split(4), reductions, PRECISION)
    before = net.reduction
    for reduction, said in zip(reductions, found, strict=True):
        net.reduction = reduction
        with torch.no_grad():
            alone = torch.cat([net(batch) for batch in images.split(4)])
        torch.testing.assert_close(said, alone, rtol=0, atol=0)
    net.reduction = before


def test_a_model_that_is_told_where_tokens_come_from_shares_layers_too(images):
    torch.manual_seed(0)
    net = timm.create_model("plainmamba_micro", img_size=32, num_classes=10).eval()
    space = Space(net.info, "ordered")
    plans = [(0,) * net.depth, (0, 4, *(0,) * (net.depth - 3), 4), (0, 4, *(0,) * (net.depth - 2))]
    reductions = [space.reduction(counts) for counts in plans]
    found = logits(net, [images[:2]], reductions, PRECISION)
    for reduction, said in zip(reductions, found, strict=True):
        net.reduction = reduction
        with torch.no_grad():
            torch.testing.assert_close(said, net(images[:2]), rtol=0, atol=0)


def test_what_plans_share_is_computed_once(net, images):
    space, runs = Space(net.info, "ordered"), []
    handles = [
        layer.register_forward_hook(lambda *_, n=n: runs.append(n))
        for n, layer in enumerate(net.layers)
    ]
    reductions = [space.reduction(counts) for counts in (PLANS[1], PLANS[3], PLANS[3])]
    logits(net, [images], reductions, PRECISION)
    for handle in handles:
        handle.remove()
    assert sorted(runs) == [0, 1, 2, 3, 4, 5, 5]


def test_the_model_keeps_its_own_reduction(net, images):
    before = net.reduction
    logits(net, [images], [Space(net.info, "ordered").reduction(PLANS[1])], PRECISION)
    similarity(net, images, PRECISION)
    assert net.reduction is before


def test_milliseconds_are_a_share_of_the_first_median(net, images, monkeypatch):
    rounds = iter([{0: [10, 20, 30], 1: [5, 5, 3]}, {0: [40, 40, 40], 1: [30, 20, 10]}])
    monkeypatch.setattr("fambav.search.price.interleave", lambda *_, **__: next(rounds))
    clock = Clock(net, images, PRECISION)
    reductions = [Space(net.info, "ordered").reduction(PLANS[1])]
    assert clock.times(reductions) == (20, [20 * 0.25])
    assert clock.times(reductions) == (20, [20 * 0.5])


@pytest.mark.parametrize("objective", ["distance", "accuracy"])
def test_a_plan_is_judged_once_and_no_plan_is_no_distance(net, images, objective, monkeypatch):
    labels = torch.arange(6)
    judge = Judge(net, [images], labels, objective=objective, precision=PRECISION)
    space = Space(net.info, "ordered")
    first = judge.losses(space, PLANS[:3])
    monkeypatch.setattr("fambav.search.judge.logits", None)  # would fail if it were called
    assert judge.losses(space, [PLANS[2], PLANS[0]]) == [first[2], first[0]]
    dense = judge.verdicts[Plan("ordered", PLANS[0])]
    if objective == "distance":
        assert dense.loss == pytest.approx(0, abs=1e-9) and first[1] > 1e-3
    else:
        with torch.no_grad():
            said = net(images).double()
        wrong = (said.argmax(1) != labels).double().mean()
        sure = torch.nn.functional.cross_entropy(said, labels) / 6
        assert dense.loss == pytest.approx(float(wrong + sure), rel=1e-5)


def test_patches_that_are_alike_have_a_double_at_the_first_layer(net, images):
    kept = net.pos_embed.data.clone()
    net.pos_embed.data.zero_()
    alike = similarity(net, torch.ones_like(images), PRECISION)
    net.pos_embed.data.copy_(kept)
    assert alike.shape == (6, 8)
    torch.testing.assert_close(alike[0], torch.ones(8, dtype=torch.float64))
    other = similarity(net, images, PRECISION)
    assert (other.diff(dim=1) <= 0).all() and other[0].max() < 0.999


def test_a_step_looks_as_harmful_as_the_pairs_it_merges_are_unlike():
    alike = torch.tensor([[1.0, 0.5], [0.9, 0.2]], dtype=torch.float64)
    assert unlikeness(alike, (0, 0), (1, 0)) == 0
    assert unlikeness(alike, (1, 0), (2, 0)) == 0.5
    assert unlikeness(alike, (0, 1), (1, 0)) == pytest.approx(-0.1)
    assert unlikeness(alike, (0, 0), (3, 0)) == 1.5  # one more than there are pairs
