"""Plans of models of stages: layers stage.layer, each stage starting with all of its tokens."""

import json

import pytest
import torch

import fambav
import fambav.models
from fambav import config
from fambav.cli import console, main
from fambav.engine.precision import Precision
from fambav.reduction import make_staged_reduction
from fambav.search.greedy import pair_similarity
from fambav.search.objective import prefix_shared_logits
from fambav.search.parsing import parse_family
from fambav.search.plan_file import plan_settings
from fambav.search.space import Plan, SearchSpace
from fambav.search.tuning import members_of
from fambav.timm_compat import timm
from tests.made import refused, run

PRECISION = Precision(torch.device("cpu"), None)
PLANS = [(0,) * 6, (20, 0, 0, 3, 0, 0), (20, 0, 2, 0, 0, 0), (0, 9, 0, 0, 0, 0), (0, 9, 2, 2, 1, 0)]


def made(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, img_size=32, depths=(2, 2, 1, 1)).eval()


def test_a_plan_fits_if_it_does_in_every_stage():
    info = made("vssd_nano").info
    space = SearchSpace(info, "tome")
    assert space.length == 64
    assert space.fits((32, 16, 8, 4, 2, 0))
    for counts in ((33, 0, 0, 0, 0, 0), (32, 17, 0, 0, 0, 0), (0, 0, 9, 0, 0, 0), (0,) * 5 + (1,)):
        assert not space.fits(counts)
    plan = space.plan((32, 0, 0, 4, 0, 0))
    assert plan.summary() == "1.1:32,2.2:4"
    assert space.plan(space.unreduced).summary() == "every token kept"
    read = make_staged_reduction(info, "tome", plan.summary()).schedule
    assert read.counts == plan.counts == space.reduction(plan.counts).schedule.counts
    assert space.share(plan.counts) == read.share == 1 - (64 + 4) / (128 + 32 + 4 + 1)


def test_uniform_strategies_remove_equal_shares_of_stages_or_act_in_one():
    strategies = dict(SearchSpace(made("vssd_nano").info, "ordered").strategies())
    assert list(strategies) == ["all", "interleaved", "first", "stage 1", "stage 2", "stage 3"]
    assert strategies["all"][15] == (16, 16, 4, 4, 1, 0)
    assert strategies["interleaved"][15] == (0, 16, 0, 4, 0, 0)
    assert strategies["first"][31] == (32, 0, 8, 0, 2, 0)
    assert strategies["stage 2"][-1] == (0, 0, 15, 15, 0, 0)
    reading = SearchSpace(made("vmamba_nano").info, "r-meeto", metric="B")
    assert dict(reading.strategies())["all"][15] == (0, 16, 0, 4, 0, 0)


@pytest.mark.parametrize("name", ["vmamba_nano", "vssd_nano"])
def test_shared_stages_give_the_logits_of_each_plan(name):
    net, space = made(name), SearchSpace(made(name).info, "ordered")
    before, images = net.reduction, torch.randn(3, 3, 32, 32)
    reductions = [space.reduction(counts) for counts in PLANS]
    found = prefix_shared_logits(net, images.split(2), reductions, PRECISION)
    assert net.reduction is before
    for own, reduction in zip(found, reductions, strict=True):
        net.reduction = reduction
        with torch.no_grad():
            expected = torch.cat([net(part) for part in images.split(2)])
        assert torch.equal(own, expected)
    assert not torch.equal(found[1], found[2])


def test_pairs_of_each_layer_are_those_of_its_stage():
    net = made("vssd_nano")
    rows = pair_similarity(net, torch.randn(2, 3, 32, 32), PRECISION)
    assert [len(row) for row in rows] == [32, 32, 8, 8, 2, 0]
    assert all((row.diff() <= 0).all() and row.abs().max() <= 1 + 1e-9 for row in rows[:5])


def test_the_plan_is_a_schedule_of_stages_even_of_a_fusion_method():
    recipe = config.Config.from_flat({"model": "vssd_nano", "data_set": "DIGITS"})
    made = plan_settings(recipe, Plan("famba-v", (0, 3), ("1.1", "1.2")))
    assert (made.flat()["reduction"], made.flat()["reduction_schedule"]) == ("famba-v", "1.2:3")


@pytest.mark.parametrize("budget", ["token-layers:0.7", "flops:0.9"])
def test_the_plan_found_meets_the_budget_and_runs_as_written(tmp_path, capsys, budget):
    source = run(tmp_path / "weights.pth", model="vssd_nano", patch_size=None, threads=1)
    words = ["--images", "8", "--steps", "3", "--trials", "4", "--budget", budget, "--compare"]
    files = [f"--output={tmp_path / 'plan.yaml'}", f"--json={tmp_path / 'plan.json'}"]
    assert console(["search-plan", str(source), *words, *files]) == 0, capsys.readouterr().err
    found, told = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    settings = config.load(tmp_path / "plan.yaml").flat()
    net = fambav.reduce(
        timm.create_model("vssd_nano", img_size=32),
        settings["reduction"],
        settings["reduction_schedule"],
    )
    assert list(net.reduction.schedule.counts) == found["counts"] and any(found["counts"])
    assert f"found: ordered {settings['reduction_schedule']}\n" in told
    assert found["cost"] <= float(budget.partition(":")[2])
    names = [row["name"] for row in found["held_out"]]
    assert names[:2] == ["every token", "found"]
    assert {"all", "stage 1"} <= set(names)
    assert all(row["cost"] >= found["cost"] for row in found["held_out"])
    words = ["--config", str(tmp_path / "plan.yaml"), "--eval", "--resume", str(source)]
    assert main(words) == 0
    assert f"{found['held_out'][1]['acc1']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "size", "schedules"),
    [
        ("all", 21, ["1.1:1,1.2:1", "1.1:21,1.2:21,2.1:5,2.2:5,3.1:1"]),
        ("keep@1.1,2.1", 32, ["1.1:1", "1.1:32,2.1:8"]),
        ("r@1.1,2.2", 8, ["1.1:1,2.2:1", "1.1:8,2.2:8"]),
        ("scale:4,0,1,0,0,0", 32, ["1.1:1", "1.1:32,2.1:8"]),
    ],
)
def test_families_of_plans_act_in_the_layers_of_stages(family, size, schedules):
    space = SearchSpace(made("vssd_nano").info, "ordered")
    members = members_of(parse_family(family), space)
    ends = [space.plan(members[n][1]).summary() for n in (0, -1)]
    assert (len(members), ends) == (size, schedules)


def test_the_answer_of_tuning_runs_as_written(tmp_path, capsys):
    source = run(tmp_path / "weights.pth", model="vssd_nano", patch_size=None, threads=1)
    words = ["--margin", "100", "--family", "keep@1.1,2.1"]
    files = [f"--output={tmp_path / 'plan.yaml'}", f"--json={tmp_path / 'plan.json'}"]
    assert console(["tune", str(source), *words, *files]) == 0, capsys.readouterr().err
    answer = json.loads((tmp_path / "plan.json").read_text())["answer"]
    assert config.load(tmp_path / "plan.yaml").flat()["reduction_schedule"] == "1.1:32,2.1:8"
    capsys.readouterr()
    words = ["--config", str(tmp_path / "plan.yaml"), "--eval", "--resume", str(source)]
    assert main(words) == 0
    assert f"{answer['acc1']:.3f}" in capsys.readouterr().out


def test_what_cannot_be_searched_is_refused_in_one_line(tmp_path):
    able = run(tmp_path / "vssd.pth", model="vssd_nano", patch_size=None)
    for family, line in (
        ("upper:2", "family is 'upper:2', expected all, interleaved, r@2.1-2.4"),
        ("r@1.9", "reduction_schedule is 'r:1@1.9', expected layers from 1.1 to 1.2 in stage 1"),
    ):
        assert line in refused("tune", able, "--margin", "1", "--family", family, program=console)
    message = refused(
        "search-plan", able, "--budget", "token-layers:0.7", "--method", "evit", program=console
    )
    assert "reduction is 'evit'" in message
    unable = run(tmp_path / "group.pth", model="groupmamba_nano", patch_size=None)
    message = refused("search-plan", unable, "--budget", "token-layers:0.7", program=console)
    assert "'groupmamba_nano', expected one whose tokens can be reduced" in message
