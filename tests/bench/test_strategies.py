"""What fusion saves, and what merging costs."""

import pytest
import torch

from fambav.bench.candidates import Candidate, Plan
from fambav.bench.step import training
from fambav.bench.strategies import PLANS, Merging, strategies
from fambav.models import Vim

CPU = torch.device("cpu")
QUICK = dict(batch=1, rounds=3, warmup=0, device=CPU)


@pytest.fixture(scope="module")
def report():
    return strategies(model="vim_micro", plans=("upper:3:9", "all:1"), **QUICK)


def test_each_plan_stands_beside_none_with_the_share_it_leaves(report):
    assert [row["plan"] for row in report.rows] == ["none", "upper:3:9", "all:1"]
    none, upper, one = report.rows
    assert none["token_layers_left"] == none["time_left"] == none["memory_left"] == 1
    assert none["merging_ms"] is none["merging_share"] is None
    assert upper["token_layers_left"] == pytest.approx((65 * 2 + 56 + 47 + 38 + 29) / (6 * 65))
    assert (upper["last_length"], one["last_length"]) == (29, 59)
    assert upper["memory_left"] < one["memory_left"] < 1
    for row in (upper, one):
        assert row["time_left"] * row["times_faster"] == pytest.approx(1)
        assert row["merging_share"] > 0


def test_the_plans_measured_by_default_can_all_be_carried_out():
    shares = []
    for text in PLANS:
        with torch.device("meta"):
            net = Vim(dim=192, depth=24, num_classes=0, **Plan.parse(text).fusion)
        shares.append(round(100 * net.schedule.share))
    assert shares == [64, 80, 57, 46, 56, 94]


def test_none_is_measured_once_under_any_of_its_names():
    assert Plan.parse("no") == Plan.parse("none") == ("none", {})
    found = strategies(model="vim_micro", plans=("no", "all:1"), **QUICK | dict(rounds=1))
    assert [row["plan"] for row in found.rows] == ["none", "all:1"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("uper:6:9", "did you mean 'upper'"),
        ("upper:9", "plan is 'upper:9', expected upper:layer:tokens"),
        ("all:6:9", "plan is 'all:6:9', expected all:tokens"),
        ("all:0", "plan is 'all:0', expected all:tokens"),
        ("all", "plan is 'all', expected all:tokens"),
        ("all:40", "fusion_token is 40, expected at most"),
    ],
)
def test_a_plan_that_cannot_be_read_or_done_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        strategies(model="vim_micro", plans=(plan,), **QUICK)


def test_merging_meets_the_tokens_of_the_model_at_the_layers_that_fuse():
    candidate = Candidate("vim_micro", "upper:4:9", dtype=torch.bfloat16)
    step = training(candidate, batch=2, device=CPU)
    merging = Merging(step)
    assert [(layer, tokens.x.shape[1]) for tokens, layer in merging.met] == [
        (3, 65),
        (4, 56),
        (5, 47),
    ]
    assert all(tokens.x.dtype == torch.bfloat16 for tokens, _ in merging.met)
    for (tokens, _), (x, residual) in zip(merging.met, merging.run(), strict=True):
        assert x.shape == residual.shape == tokens.x.shape
        assert x.any()
        assert residual.any()
    assert not step.net.reduction._forward_pre_hooks


@pytest.mark.gpu
def test_plans_are_measured_as_graphs_on_a_gpu():
    quick = QUICK | dict(device=torch.device("cuda", 0), batch=4)
    report = strategies(model="vim_micro", plans=("upper:3:9",), cuda_graphs=True, **quick)
    assert all(row["peak_mib"] > 0 for row in report.rows)
    assert report.find(plan="upper:3:9")["merging_ms"] > 0
