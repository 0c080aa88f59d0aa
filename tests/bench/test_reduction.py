"""What reduction methods cost where they act."""

import json
import math

import pytest
import torch

from fambav.bench.reduction import nearest_count, reduction
from fambav.cli import console
from fambav.commands.bench import VIMS
from fambav.commands.bench import parser as bench_parser
from fambav.config import ConfigError
from fambav.models import Vim
from fambav.reduction import make_reducer
from fambav.registry import METHODS
from tests.bench import find

CPU = torch.device("cpu")
QUICK = dict(batch=1, rounds=1, warmup=0, device=CPU)
VIM, PLAIN = "vim_micro", "plainmamba_micro"


@pytest.fixture(scope="module")
def vim():
    return reduction(model=VIM, **QUICK)


@pytest.fixture(scope="module")
def plainmamba():
    return reduction(model=PLAIN, **QUICK)


def test_every_method_has_a_row_in_a_vim(vim):
    assert [row["method"] for row in vim.rows] == list(METHODS)
    assert vim.skipped == {}
    assert (vim.settings["length"], vim.settings["layer"]) == (65, 4)
    assert not any("param_order" in row for row in vim.rows)


def test_every_method_has_a_row_in_a_plainmamba_of_the_order_that_it_needs(plainmamba):
    assert [row["method"] for row in plainmamba.rows] == list(METHODS)
    assert plainmamba.skipped == {}
    orders = {row["method"]: row["param_order"] for row in plainmamba.rows}
    assert orders.pop("prune-aligned") == "permuted"
    assert set(orders.values()) == {"raster"}


def test_a_row_is_compared_with_a_plain_layer_of_its_own_order(plainmamba):
    layers = {(row["param_order"], row["layer_ms"]) for row in plainmamba.rows}
    assert sorted(order for order, _ in layers) == ["permuted", "raster"]
    assert len({ms for _, ms in layers}) == 2


@pytest.mark.parametrize("report", ["vim", "plainmamba"])
def test_shares_are_those_of_one_round(report, request):
    for row in request.getfixturevalue(report).rows:
        assert row["choose_ms"] > 0
        assert row["share_of_layer"] == pytest.approx(row["reduce_ms"] / row["layer_ms"])
        assert row["share_of_layer"] > 0
        assert row["launch"] == "eager"
        assert math.isfinite(row["net"])
        if row["intermediates"] is None:
            assert row["net"] == row["share_of_layer"]
        else:
            assert (row["net"] > row["share_of_layer"]) == (row["intermediates"] > 1)


@pytest.mark.parametrize("report", ["vim", "plainmamba"])
def test_only_methods_that_read_a_mixer_pay_for_it_and_only_aligned_ones_for_aging(report, request):
    rows = request.getfixturevalue(report).rows
    reading = {row["method"] for row in rows if row["intermediates"] is not None}
    aging = {row["method"] for row in rows if row["aging"] is not None}
    reading = {name for name in METHODS if make_reducer(name).needs}
    aligned = {name for name in METHODS if make_reducer(name).scan == "aligned"}
    assert reading == reading | aligned  # a cached gap is read, too
    assert aging == aligned == {"prune-aligned"}


def test_mixers_look_positions_up_only_where_a_grid_has_gaps(vim, plainmamba):
    assert {row["lookup"] for row in vim.rows} == {None}
    names = {row["method"] for row in plainmamba.rows if row["lookup"] is not None}
    assert names == set(METHODS) - {
        "storm",
        "prune-aligned",
    }  # the one leaves a grid, the other scans across gaps


def test_five_percent_of_the_patches_go_or_the_nearest_step_of_a_grid(vim):
    removed = {row["method"]: row["removed"] for row in vim.rows}
    assert removed.pop("storm") == 8  # 8 x 8 patches become 8 x 7
    assert set(removed.values()) == {3}
    with torch.device("meta"):
        body = Vim(dim=192, depth=24).info
    assert nearest_count(make_reducer("storm"), body) == 14
    assert nearest_count(make_reducer("ordered"), body) == 10


def test_a_count_that_a_method_cannot_remove_is_its_reason():
    report = reduction(model=VIM, methods=("ordered", "storm", "ordered"), count=9, **QUICK)
    assert [(row["method"], row["removed"]) for row in report.rows] == [("ordered", 9)]
    assert "expected a number that makes of 8 x 8 patches a smaller grid" in report.skipped["storm"]


def test_half_precision_is_measured_as_well():
    report = reduction(model=VIM, methods=("utrc",), dtype=torch.bfloat16, **QUICK)
    assert report.settings["dtype"] == "bfloat16"
    assert find(report, method="utrc")["intermediates"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch=0), "batch is 0, expected at least 1"),
        (dict(count=0), "count is 0, expected at least 1"),
        (dict(rounds=0), "rounds is 0, expected at least 1"),
        (dict(methods=("ordred",)), "method is 'ordred', expected a known name; did you mean"),
        (dict(methods=()), "method is empty, expected one or more"),
        (dict(count=60), "expected at most 32 at layer 4"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        reduction(**dict(model=VIM, methods=("ordered",)) | QUICK | arguments)


def test_the_command_prints_its_table_and_writes_it(capsys, tmp_path):
    words = f"bench reduction --model {PLAIN} --batch 1 --rounds 1 --warmup 0 --device cpu"
    target = tmp_path / "reduction.json"
    methods = ["--method", "prune-aligned", "ordered", "storm"]
    more = [*methods, "--count", "4", "--json", str(target)]
    assert console([*words.split(), *more]) == 0
    shown = capsys.readouterr().out
    assert "share of layer" in shown
    assert "storm is absent: " in shown
    rows = json.loads(target.read_text())["rows"]
    assert [(row["method"], row["param_order"], row["removed"]) for row in rows] == [
        ("prune-aligned", "permuted", 4),
        ("ordered", "raster", 4),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "tomme"], "invalid choice: 'tomme'"),
        (["--model", "vim_nano"], "invalid choice: 'vim_nano'"),
        (["--count", "x"], "--count is 'x', expected a whole number"),
        (
            f"--model {PLAIN} --method prune-aligned --count 64 --device cpu".split(),
            "expected at most 63 at layer 4",
        ),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, words, message):
    assert console(["bench", "reduction", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("model", ["vmamba_nano", "vssd_nano"])
def test_each_stage_has_a_row_for_every_method_that_can_act_there(model):
    report = reduction(model=model, methods=("tome", "random", "storm", "evit"), **QUICK)
    rows = {(row["layer"], row["method"]): row for row in report.rows}
    names = ("tome", "random", "storm")
    assert list(rows) == [(f"{stage}.2", name) for stage in (1, 2, 3) for name in names]
    sizes = [(row["tokens"], row["removed"]) for row in report.rows if row["method"] != "tome"]
    assert sizes == [(64, 3), (64, 8), (16, 1), (16, 4), (4, 1), (4, 2)]
    for row in report.rows:
        assert row["launch"] == "eager"
        assert all(row[f"{part}_ms"] > 0 for part in ("choose", "reduce", "restore", "layer"))
        assert row["layer_mib"] > row["reduce_mib"] > 0
    # A merge keeps its weights for the backward pass, a drop only what it read.
    assert rows["1.2", "tome"]["reduce_mib"] > rows["1.2", "random"]["reduce_mib"]
    assert report.skipped["stage 4"] == "it has a single token"
    assert "reads gated" in report.skipped["evit in stage 1"]


def test_too_many_tokens_of_every_stage_are_refused_in_one_line(capsys):
    words = "--model vssd_nano --method tome --count 40 --device cpu"
    assert console(["bench", "reduction", *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: reduction_schedule is '1.2:40', expected at most 32")
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["block", "strategies"])
def test_kinds_that_measure_vim_take_no_other_model(kind):
    parser = bench_parser()
    assert parser.parse_args([kind, "--model", VIM]).model == VIM
    with pytest.raises(ConfigError, match=f"invalid choice: '{PLAIN}'"):
        parser.parse_args([kind, "--model", PLAIN])
    assert VIMS[0] == "vim_tiny"


def test_a_method_whose_parts_cannot_all_be_replayed_is_eager_beside_an_eager_layer(monkeypatch):
    def with_replays(runs, _):
        refused = {("ordered", "choose")}
        ways = {key: ("eager", "replayed") if key not in refused else ("eager",) for key in runs}
        made = {(n, way, part): runs[n, part] for (n, part) in runs for way in ways[n, part]}
        return made, {"ordered replayed choose": "no"}

    monkeypatch.setattr("fambav.bench.reduction.with_replays", with_replays)
    report = reduction(model=VIM, methods=("ordered", "tome"), **QUICK)
    assert [row["launch"] for row in report.rows] == ["eager", "replayed"]
    assert report.skipped == {"ordered replayed choose": "no"}
    ordered, tome = report.rows
    assert ordered["layer_ms"] != tome["layer_ms"]


@pytest.mark.gpu
def test_reductions_are_timed_as_replays_on_a_gpu():
    gpu = dict(batch=4, rounds=3, warmup=1, device=torch.device("cuda", 0))
    report = reduction(model=VIM, **gpu)
    assert {row["method"] for row in report.rows} == set(METHODS)
    assert {row["launch"] for row in report.rows} == {"replayed"}, report.skipped
