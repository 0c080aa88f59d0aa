"""Grids carried out: what is finished stays, what fails does not stop the rest, and the tables."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from fambav.cli import console
from fambav.config import Config
from fambav.experiments import cell, process, read_grid, sweep
from fambav.models import Vim
from fambav.training import job
from tests.experiments.made import ROOT, SCRATCH, UNREDUCED, accuracies, edit, go, losses, written

CELLS = 8  # two unreduced models; each then tuned, with fusion, and tuned with fusion
PHASES = ("training-free", "fine-tuned")
SHORT = ("finetune: {epochs: 2, lr: 5.0e-4}\n", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A whole grid, carried out."""
    return go(written(place, UNREDUCED), tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the finished grid's folder."""
    return shutil.copytree(finished.folder, tmp_path / "out")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A grid whose rows are trained from scratch, carried out; its checkpoints are kept."""
    place = tmp_path_factory.mktemp("scratch")
    return written(place, SCRATCH, epochs=2), go(place / "grid.yaml", place / "out", keep=True)


@pytest.fixture
def copied(alone, tmp_path):
    """The path of that grid, and a copy of its folder."""
    return alone[0], shutil.copytree(alone[1].folder, tmp_path / "copied")


def lines(folder):
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def test_every_cell_runs_once_and_says_so(finished):
    assert len(finished.ran) == len(set(finished.ran)) == CELLS
    assert finished.said[0] == f"0 of {CELLS} cells are finished"
    assert finished.said[1].startswith(f"[1/{CELLS}] unreduced, seed 0, unreduced: ")
    assert " % in " in finished.said[1]
    assert finished.said[-2].endswith("min left")
    assert not finished.said[-1].endswith("min left")


def test_a_cell_leaves_a_run_folder_without_checkpoints_but_unreduced_weights(finished):
    files = [p.relative_to(finished.folder) for p in finished.folder.rglob("*.*")]
    assert {str(p) for p in files if p.suffix in (".pth", ".safetensors")} == {
        f"cells/unreduced/seed{seed}/unreduced/model.safetensors" for seed in (0, 1)
    }
    tuned = finished.folder / "cells/ordered/seed1/fine-tuned"
    assert (tuned / "log.txt").read_text().count("\n") == 2
    assert "Epoch: [0]" in (tuned / "output.txt").read_text()


def test_without_training_the_unreduced_weights_are_evaluated_with_the_rows_settings(finished):
    output = finished.folder / "cells/ordered/seed0/training-free/output.txt"
    assert "total removed: 9 of 16 tokens" in output.read_text()
    assert not (output.parent / "log.txt").exists()


def test_what_a_cell_does_is_what_main_py_does_with_its_settings(finished, tmp_path):
    from fambav.cli import main

    folder = finished.folder / "cells/unreduced/seed0/fine-tuned"
    text = (folder / "cell.yaml").read_text()
    assert str(folder) in text
    (tmp_path / "cell.yaml").write_text(text.replace(str(folder), str(tmp_path / "again")))
    assert main(["--config", str(tmp_path / "cell.yaml")]) == 0
    assert losses(tmp_path / "again")["log.txt"] == pytest.approx(losses(folder)["log.txt"])


def test_fine_tuning_starts_from_the_unreduced_weights_of_its_seed(finished):
    def losses(row, seed, phase):
        log = finished.folder / "cells" / row / f"seed{seed}" / phase / "log.txt"
        return [json.loads(line)["test_loss"] for line in log.read_text().splitlines()]

    unreduced, tuned = losses("unreduced", 0, "unreduced"), losses("unreduced", 0, "fine-tuned")
    assert len(unreduced) == 1
    assert tuned[-1] < tuned[0] < unreduced[0]


def test_what_a_process_does_once_is_done_before_an_epoch_is_timed(alone, tmp_path, monkeypatch):
    folder = tmp_path / "cell"
    folder.mkdir()
    shutil.copy(alone[1].folder / "cells/upper/seed0/scratch/cell.yaml", folder)
    seen = []

    def begin(job):
        seen.append("training")
        raise KeyboardInterrupt

    def passed(net, images):
        seen.append(tuple(images.shape))
        scores = forward(net, images)
        scores.register_hook(lambda gradient: seen.append("backward"))
        return scores

    forward = Vim.forward
    monkeypatch.setattr(Vim, "forward", passed)
    monkeypatch.setattr(job.TrainingJob, "train", begin)
    with pytest.raises(KeyboardInterrupt):
        cell.figures(folder)
    assert seen == [(8, 3, 16, 16), "backward", "training"]


def test_finished_cells_are_not_run_again(finished, place, again):
    before = {path: path.stat().st_mtime_ns for path in again.rglob("cells/**/*.*")}
    found = go(written(place, UNREDUCED), again)
    assert found.ran == []
    assert found.said == [f"{CELLS} of {CELLS} cells are finished"]
    assert accuracies(found.found) == accuracies(finished.found)
    assert before == {path: path.stat().st_mtime_ns for path in again.rglob("cells/**/*.*")}


def test_results_of_the_first_version_stay_valid(place, again):
    def age(known):
        for name in ("started", "ended", "resumed"):
            del known[name]
        del known["about"]["cpu"], known["figures"]["acc5"]
        known["about"]["threads"] = 2

    for path in again.rglob("result.json"):
        edit(path, age)
    for path in (*again.rglob("machine.json"), *again.rglob("figures.json")):
        path.unlink()
    found = go(written(place, UNREDUCED), again)
    assert found.ran == []
    assert all(line["started"] and not line["ended"] for line in lines(again))
    assert "| unreduced |" in (again / "results.md").read_text()


def test_a_changed_row_runs_again_and_nothing_else(place, again):
    found = go(written(place, UNREDUCED, ("fusion_token: 3", "fusion_token: 4")), again)
    assert found.ran == [f"ordered, seed {seed}, {phase}" for seed in (0, 1) for phase in PHASES]
    assert {line["fusion_token"] for line in lines(again)} == {"", "4"}
    log = again / "cells/ordered/seed0/fine-tuned/log.txt"
    assert json.loads(log.read_text().splitlines()[-1])["tokens"][-1] == 4
    assert not list(again.rglob("earlier-*"))


def test_a_new_seed_runs_alone_and_what_is_gone_or_cut_short_runs_again(place, again):
    (again / "cells/unreduced/seed1/unreduced/model.safetensors").unlink()
    (again / "cells/ordered/seed1/training-free/result.json").write_text('{"row": ')
    found = go(written(place, UNREDUCED, ("[0, 1]", "[0, 1, 5]")), again)
    fifth = [name for name in found.ran if ", seed 5, " in name]
    assert len(fifth) == CELLS // 2
    assert set(found.ran) - set(fifth) == {
        "unreduced, seed 1, unreduced",
        "ordered, seed 1, training-free",
    }


@pytest.mark.parametrize(
    "harm",
    [
        lambda known: known["figures"].update(acc1="high"),
        lambda known: known["figures"].update(acc1=float("inf")),
        lambda known: known["about"].pop("packages"),
        lambda known: known.update(settings=[1]),
    ],
)
def test_a_result_with_a_wrong_entry_is_no_result(place, again, harm):
    grid = read_grid(written(place, UNREDUCED))
    assert all(process.finished(one, again) for one in grid.cells)
    for path in again.rglob("result.json"):
        edit(path, harm)
    assert not any(process.finished(one, again) for one in grid.cells)


def test_a_cell_at_work_says_how_far_it_is(place, again, tmp_path):
    cell = read_grid(written(place, UNREDUCED)).cells[0]
    about = json.loads((again / cell.folder / "result.json").read_text())["about"]
    works = process.Process(cell, again, ({}, None), about)
    try:
        assert re.fullmatch(
            rf"{cell.name}: epoch 1 of 1, \d+\.\d+ %; 0\.0 min left", works.progress()
        )
        assert works.progress() is None
    finally:
        works.end()
    works = process.Process(cell, tmp_path, ({}, None), about)
    try:
        line = (
            f"{cell.name}: in its first epoch; {tmp_path / cell.folder / 'output.txt'} has its log"
        )
        assert works.progress() == line
    finally:
        works.end()


def test_a_grid_that_takes_long_is_not_silent(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_QUIET", 0)
    said = go(written(place, UNREDUCED, SHORT), tmp_path / "out").said
    assert said[1].startswith("unreduced, seed 0, unreduced: in its first epoch; ")


def test_a_dry_run_counts_what_is_left_and_writes_nothing(place, again, tmp_path, capsys):
    path, new = str(written(place, UNREDUCED)), tmp_path / "new"
    table = ("table", path, "--dry-run", "--epochs", "4", "--format", "csv", "--output-dir")
    assert console([*table, str(new)]) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[0] == ["row", "token-layers", "cells", "cells left", "epochs left"]
    assert rows[1] == ["unreduced", "1.00", "4", "4", "12"]
    assert rows[2][2:] == ["4", "4", "4"]
    assert not new.exists()
    assert console(["table", path, "--dry-run", "--output-dir", str(again)]) == 0
    assert "as many as 0.0 without reduction" in capsys.readouterr().out
    shown = console(
        ["table", path, "--dry-run", "--set", "smoothing=0.2", "--output-dir", str(again)]
    )
    assert (shown, "min left" in capsys.readouterr().out) == (0, False)


def test_training_that_was_cut_short_goes_on_where_its_settings_and_machine_are_the_same(
    alone, copied
):
    path, folder = copied
    upper, none = (folder / f"cells/{row}/seed0/scratch" for row in ("upper", "none"))
    assert (upper / "model.safetensors").exists()
    for begun in (upper, none):
        (begun / "result.json").unlink()
        (begun / "stray").touch()
    edit(none / "machine.json", lambda known: known.update(cpu="another"))
    found = go(path, folder)
    assert [known["resumed"] for known in found.found.values()] == [False, True]
    assert "going on from" in (upper / "output.txt").read_text()
    assert (upper / "stray").exists()
    assert not (none / "stray").exists()
    assert accuracies(found.found) == accuracies(alone[1].found)
    assert not list(folder.rglob("*.safetensors"))


def test_a_cell_that_fails_is_told_the_others_go_on_and_it_is_tried_again(place, again, capsys):
    wrong = ("rows:", "rows:\n  - {name: wrong, fusion_strategy: all, fusion_token: 9}")
    shutil.rmtree(again / "cells/ordered/seed1")
    weights = again / "cells/unreduced/seed1/unreduced/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"no weights")
    path = written(place, UNREDUCED, wrong)
    assert console(["table", "--grid", str(path), "--output_dir", str(again)]) == 2
    out, err = capsys.readouterr()
    assert "wrong, seed 0, training-free: failed: fusion_token is 9, expected at most" in out
    assert f"ordered, seed 1, fine-tuned: failed: {weights}" in out
    assert err.startswith(f"error: 6 of {CELLS + 4} cells failed: wrong, seed 0, training-free; ")
    assert err.count("\n") == 1
    failed = {(line["row"], line["seed"]) for line in lines(again) if line["error"]}
    assert failed == {("wrong", "0"), ("wrong", "1"), ("ordered", "1")}
    assert "Traceback" in (again / "cells/wrong/seed0/fine-tuned/output.txt").read_text()
    assert "| wrong | - | - | - | - | - | - | - | - |" in (again / "results.md").read_text()
    weights.write_bytes(whole)
    found = go(written(place, UNREDUCED), again)
    assert found.ran == [f"ordered, seed 1, {phase}" for phase in PHASES]
    assert not any(known["error"] for known in found.found.values())


def test_cells_of_a_unreduced_model_that_diverged_fail_in_their_turn(tmp_path):
    path = written(tmp_path, UNREDUCED, ("[0, 1]", "[0]"), SHORT)
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text().replace("lr: 1.0e-3", "lr: 1.0e+30"))
    found = go(path, tmp_path / "out").found
    assert found["unreduced, seed 0, unreduced"]["error"].startswith("loss or gradient is not")
    message = "start is unreduced, seed 0, unreduced, expected a cell that is finished"
    assert found["ordered, seed 0, training-free"]["error"] == message


def test_the_tidy_table_has_a_line_for_each_cell(finished):
    found = lines(finished.folder)
    assert len(found) == CELLS
    keys = [(line["row"], line["seed"], line["phase"]) for line in found]
    assert len(set(keys)) == CELLS
    ordered = [line for line in found if line["row"] == "ordered"]
    assert {line["fusion_method"] for line in ordered} == {"ordered"}
    assert {line["fusion_method"] for line in found if line["row"] == "unreduced"} == {""}
    assert {line["token_layers"] for line in ordered} == {"0.8125"}
    assert {line["threads"] for line in found} == {"1"}
    for line in found:
        name = f"{line['row']}, seed {line['seed']}, {line['phase']}"
        assert float(line["acc1"]) == finished.found[name]["figures"]["acc1"]
        trained = line["phase"] != "training-free"
        assert bool(line["seconds"]) == bool(line["memory_mib"]) == trained
        assert "2026" <= line["started"] <= line["ended"]
        assert "torch " in line["versions"]


def test_the_command_prints_the_table_and_leaves_it(place, again, capsys):
    words = ["table", "--grid", str(written(place, UNREDUCED)), "--output_dir", str(again)]
    assert console(words) == 0
    plain = capsys.readouterr().out
    assert console([*words, "--format", "markdown"]) == 0
    drawn, told = capsys.readouterr()
    assert told == f"{CELLS} of {CELLS} cells are finished\n"
    assert re.match(r"row +token-layers +MFLOPs +training-free %", plain.splitlines()[1])
    assert drawn == (again / "results.md").read_text()
    rows = [line.split(" | ")[0] for line in drawn.splitlines() if line.startswith("| ")]
    assert rows == ["| row", "| unreduced", "| ordered"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--grid", "none.yaml", "--output_dir", "x"],
            "config is 'none.yaml', expected a readable",
        ),
        (["run", "--grid", "none.yaml"], "--grid stands without runs"),
        (["none.yaml", "--output_dir", "x"], "config is 'none.yaml', expected a readable"),
        (["n.yaml", "--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["n.yaml", "--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["one", "two", "--jobs", "2"], "--jobs has no meaning without a grid"),
        (["one", "two", "--set", "lr=1"], "--set has no meaning without a grid"),
        (["one", "two", "--dry-run"], "--dry_run has no meaning without a grid"),
        (["digits-table1", "--reach", "9"], "--reach has no meaning with a grid"),
        (["one", "two", "--reach", "9", "--mixed"], "--reach has no meaning with --mixed, which"),
        (["digits-table1", "--set", "lr"], "--lr has no value, expected one after it"),
        (["one", "two", "--output-dir", "x"], "--output_dir has no meaning without a grid"),
        ([], "the following arguments are required: RUN... or GRID"),
        (["digit-table1"], "'digit-table1' is no run folder, expected one, or a grid; did you"),
        (["digits-table1", "--format", "pdf"], "invalid choice: 'pdf'"),
    ],
)
def test_a_wrong_command_is_one_line_and_writes_nothing(
    tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    assert console(["table", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_two_jobs_have_the_numbers_of_one(finished, place, tmp_path):
    found = go(written(place, UNREDUCED), tmp_path / "out", jobs=2)
    assert sorted(found.ran) == sorted(finished.ran)
    assert accuracies(found.found) == pytest.approx(accuracies(finished.found))
    ours, theirs = losses(found.folder), losses(finished.folder)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-5)


def test_every_row_is_trained_from_scratch(alone):
    found = alone[1]
    assert found.ran == ["none, seed 0, scratch", "upper, seed 0, scratch"]
    for known in found.found.values():
        assert (known["figures"]["epochs"], known["figures"]["acc5"]) == (2, 100.0)
        assert not known["resumed"]
    none, upper = (losses(found.folder / f"cells/{row}") for row in ("none", "upper"))
    assert len(none) == len(upper) == 1
    assert none != upper


def test_a_finished_grid_gives_its_table_in_every_format_and_trains_nothing(alone, capsys):
    for form, start in {
        "text": "2 of 2 cells are finished\nrow ",
        "markdown": "| row |",
        "latex": "% needs",
        "csv": "row,fusion_strategy,",
        "json": '{\n "grid": "grid",',
    }.items():
        words = ["table", str(alone[0]), "--output_dir", str(alone[1].folder), "--format", form]
        assert console(words) == 0
        out, err = capsys.readouterr()
        assert out.startswith(start)
        assert (err == "") == (form == "text")


def test_a_grid_of_another_machine_is_refused_before_anything_runs(copied, capsys):
    path, folder = copied
    left = folder / "cells/upper/seed0/scratch/result.json"
    left.unlink()
    words = ["table", "--grid", str(path), "--output_dir", str(folder), "--jobs", "2"]
    assert console(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(r"error: cells in .* differ in jobs \(1, 2\), expected one machine", err)
    assert not left.exists()
    assert console([*words, "--mixed"]) == 0
    out = capsys.readouterr().out
    assert "train s" not in out
    assert "memory" not in out
    assert "top-1 %" in out
    assert console(words) == 2


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"cpu": "Xeon"}, r"differ in cpu \(.*, Xeon\), expected one machine"),
        ({"gpu": "H200", "jobs": 3}, r"differ in gpu \(.*, H200\), jobs \(1, 3\)"),
        ({"platform": "Darwin"}, r"differ in platform \(.*, Darwin\)"),
    ],
)
def test_cells_of_several_machines_are_refused_in_one_line(copied, about, message):
    path, folder = copied
    changed = folder / "cells/upper/seed0/scratch/result.json"
    edit(changed, lambda known: known["about"].update(about))
    with pytest.raises(ValueError, match=message) as caught:
        go(path, folder)
    assert "\n" not in str(caught.value)
    assert "--mixed leaves time and memory out" in str(caught.value)


def test_threads_of_the_grids_own_process_do_not_count(copied):
    path, folder = copied

    def age(known):
        known["about"]["threads"] = 64
        del known["about"]["cpu"]

    edit(folder / "cells/none/seed0/scratch/result.json", age)
    assert go(path, folder).ran == []


def test_a_name_is_looked_up_where_grids_lie_and_its_runs_have_its_name(
    alone, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("fambav.registry.grids", lambda: {"tiny": alone[0]})
    monkeypatch.chdir(tmp_path)
    assert console(["table", "tiny", "--seeds", "2"]) == 0
    assert "mean ± sample standard deviation over seeds 0, 1" in capsys.readouterr().out
    assert len(list((tmp_path / "output/grid").rglob("result.json"))) == 4
    assert console(["table", "tinny"]) == 2
    assert capsys.readouterr().err == (
        "error: 'tinny' is no run folder, expected one, or a grid; did you mean 'tiny'?\n"
    )
    assert console(["table", "output/grid"]) == 2
    assert "is the folder of a grid, expected runs, or the grid" in capsys.readouterr().err
    run = tmp_path / "output/grid/cells/none/seed0/scratch"
    assert console(["table", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("scratch  vim_micro")


def test_shipped_grids_are_listed(capsys):
    assert console(["list", "grids"]) == 0
    names = capsys.readouterr().out.split()
    assert {"digits-table1", "cifar100-table1-tiny", "shapes100-table1"} <= set(names)


def test_each_process_gets_a_gpu_of_its_own_and_shares_them_in_turn(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *number: f"GPU {number}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab")
    named = [variables["CUDA_VISIBLE_DEVICES"] for variables, _ in process.slots(3)]
    assert named == ["4", "GPU-ab", "4"]
    assert process.slots(1)[0][0] == {}
    found = go(alone[0], tmp_path / "out", jobs=2, mixed=True).found.values()
    assert {known["about"]["gpu"] for known in found} == {"GPU (0,)", "GPU (1,)"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [variables for variables, _ in process.slots(2)] == [{}, {}]


def test_the_gpu_of_a_process_is_in_its_environment_before_cuda_is_asked(tmp_path, monkeypatch):
    """Also what all processes are forked from asks for no GPU: it would be every process's."""
    code = """
import os, threading, torch
from pathlib import Path
asked = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda: asked.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
from fambav.experiments import cell
assert not asked and threading.active_count() == 1
cell.figures = lambda folder: {"asked": torch.cuda.is_available() or asked}
cell.perform(Path("."), {"CUDA_VISIBLE_DEVICES": "7"})
def fail(folder): raise ValueError("in two\\nlines")
cell.figures = fail
Path("two").mkdir()
cell.perform(Path("two"), {})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "4,7"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert json.loads((tmp_path / "figures.json").read_text()) == {"figures": {"asked": ["7"]}}
    assert done.returncode == 1
    assert json.loads((tmp_path / "two/figures.json").read_text()) == {"error": "in two lines"}


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 3, ["0", "1", "2"]), ("5,3", 2, ["5", "3"]), ("", 0, []), (None, 0, [])],
)
def test_gpus_are_named_as_the_environment_names_them(monkeypatch, visible, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert process.gpus() == expected


def test_there_are_as_many_jobs_as_gpus_unless_the_user_says_otherwise(alone, monkeypatch):
    seen = []

    def stop(grid, folder, **given):
        seen.append(given["jobs"])
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", stop)
    for names, words in ((["0", "1", "2"], []), (["0"], []), ([], []), (["0", "1"], ["--jobs=1"])):
        monkeypatch.setattr(process, "gpus", lambda names=names: names)
        console(["table", str(alone[0]), "--output_dir", "x", *words])
    assert seen == [3, 1, 1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        dict(data_set="SHAPES-SEG", model="vssd_nano", head="upernet", head_channels=16),
        dict(data_set="SHAPES-DET", model="vssd_nano", head="faster-rcnn", head_channels=16),
        dict(data_set="WAVES", model="tsm2"),
        dict(model="groupmamba_nano", distillation_type="hard", teacher_model="timm/test_resnet"),
    ],
    ids=lambda settings: settings.get("head") or settings["model"],
)
def test_every_kind_of_model_is_warmed_up(settings):
    with job.opened(Config.from_flat({**settings, "batch_size": 2, "num_workers": 0})) as made:
        cell._warm_up(made)
