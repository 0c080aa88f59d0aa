"""Grids carried out: what is finished stays, what fails does not stop the rest, and the tables."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import fambav
from fambav import experiments
from fambav.build import jobs
from fambav.cli import console
from fambav.engine.train import DivergedError
from tests.data.made import made_cifar

ROOT = Path(fambav.__file__).parents[1]
BASE = """model: vim_micro
input_size: 16
class_token: none
data_set: CIFAR
data_path: {folder}
num_workers: 0
batch_size: 8
epochs: 1
warmup_epochs: 0
lr: 1.0e-3
unscale_lr: true
repeated_aug: false
model_ema: false
"""
GRID = """base: base.yaml
seeds: [0, 1]
finetune: {epochs: 2, lr: 5.0e-4}
rows:
  - name: ordered
    fusion_strategy: upper
    fusion_layer: 4
    fusion_token: 3
    fusion_method: ordered
"""
CELLS = 8  # two dense models; each then tuned, with fusion, and tuned with fusion


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    made_cifar(folder, train=16, test=37, classes=3)
    (folder / "base.yaml").write_text(BASE.format(folder=folder))
    return folder


@pytest.fixture
def written(place):
    """Writes a grid, some of its text replaced."""

    def write(*changes):
        text = GRID
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (place / "grid.yaml").write_text(text)
        return place / "grid.yaml"

    return write


def go(path, folder, **given):
    """Carry out a grid; return its records, the cells that ran, and what was said."""
    said = []
    grid = experiments.read(path)
    given = {"jobs": 1, "keep": False, **given}
    found = experiments.run(grid, folder, say=said.append, **given)
    ran = [line.split("] ")[1].split(": ")[0] for line in said if line.startswith("[")]
    return SimpleNamespace(grid=grid, found=found, ran=ran, said=said, folder=folder)


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A whole grid, carried out in this process."""
    (place / "grid.yaml").write_text(GRID)
    return go(place / "grid.yaml", tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the finished grid's folder."""
    return shutil.copytree(finished.folder, tmp_path / "out")


def lines(folder):
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def accuracies(found):
    return {name: known["figures"].get("acc1") for name, known in found.items()}


def test_every_cell_runs_once_and_says_so(finished):
    assert len(finished.ran) == len(set(finished.ran)) == CELLS
    assert finished.said[0] == f"0 of {CELLS} cells are finished"
    assert finished.said[1].startswith(f"[1/{CELLS}] dense, seed 0, dense: ")
    assert " % in " in finished.said[1]
    assert finished.said[-2].endswith("min left")
    assert not finished.said[-1].endswith("min left")


def test_a_cell_leaves_a_run_folder_without_checkpoints_but_dense_weights(finished):
    files = [p.relative_to(finished.folder) for p in finished.folder.rglob("*.*")]
    assert {str(p) for p in files if p.suffix in (".pth", ".safetensors")} == {
        f"cells/dense/seed{seed}/dense/model.safetensors" for seed in (0, 1)
    }
    tuned = finished.folder / "cells/ordered/seed1/fine-tuned"
    assert (tuned / "log.txt").read_text().count("\n") == 2
    assert "Epoch: [0]" in (tuned / "output.txt").read_text()


def test_without_training_the_dense_weights_are_evaluated_with_the_rows_settings(finished):
    output = finished.folder / "cells/ordered/seed0/training-free/output.txt"
    assert "total removed: 9 of 16 tokens" in output.read_text()
    assert not (output.parent / "log.txt").exists()


def test_fine_tuning_starts_from_the_dense_weights_of_its_seed(finished):
    def losses(row, seed, phase):
        log = finished.folder / "cells" / row / f"seed{seed}" / phase / "log.txt"
        return [json.loads(line)["test_loss"] for line in log.read_text().splitlines()]

    dense, tuned = losses("dense", 0, "dense"), losses("dense", 0, "fine-tuned")
    assert len(dense) == 1
    assert tuned[-1] < tuned[0] < dense[0]


def test_finished_cells_are_not_run_again(finished, written, again):
    before = {path: path.stat().st_mtime_ns for path in again.rglob("cells/**/*.*")}
    found = go(written(), again)
    assert found.ran == []
    assert found.said == [f"{CELLS} of {CELLS} cells are finished"]
    assert accuracies(found.found) == accuracies(finished.found)
    assert before == {path: path.stat().st_mtime_ns for path in again.rglob("cells/**/*.*")}


def test_results_of_the_first_version_stay_valid(written, again):
    for path in again.rglob("result.json"):
        known = json.loads(path.read_text())
        for name in ("started", "ended", "resumed"):
            del known[name]
        del known["about"]["cpu"], known["figures"]["acc5"]
        known["about"]["threads"] = 2
        path.write_text(json.dumps(known))
    for path in again.rglob("machine.json"):
        path.unlink()
    found = go(written(), again)
    assert found.ran == []
    assert all(line["started"] and not line["ended"] for line in lines(again))
    assert "| dense |" in (again / "results.md").read_text()


def test_a_changed_row_runs_again_and_nothing_else(written, again):
    found = go(written(("fusion_token: 3", "fusion_token: 4")), again)
    phases = ("training-free", "fine-tuned")
    assert found.ran == [f"ordered, seed {seed}, {phase}" for seed in (0, 1) for phase in phases]
    assert {line["fusion_token"] for line in lines(again)} == {"", "4"}
    log = again / "cells/ordered/seed0/fine-tuned/log.txt"
    assert json.loads(log.read_text().splitlines()[-1])["tokens"][-1] == 4
    assert not list(again.rglob("earlier-*"))


def test_a_new_seed_runs_alone(written, again):
    found = go(written(("[0, 1]", "[0, 1, 5]")), again)
    assert len(found.ran) == CELLS // 2
    assert all(", seed 5, " in name for name in found.ran)


def test_dense_weights_that_are_gone_are_trained_again(written, again):
    (again / "cells/dense/seed1/dense/model.safetensors").unlink()
    assert go(written(), again).ran == ["dense, seed 1, dense"]


def test_a_result_that_is_cut_short_is_none(written, again):
    (again / "cells/ordered/seed1/training-free/result.json").write_text('{"row": ')
    assert go(written(), again).ran == ["ordered, seed 1, training-free"]


def test_checkpoints_are_kept_if_that_is_asked_for(written, again):
    shutil.rmtree(again / "cells/ordered")
    go(written(("[0, 1]", "[0]")), again, keep=True)
    assert (again / "cells/ordered/seed0/fine-tuned/model.safetensors").exists()


def test_training_that_was_cut_short_goes_on_where_its_settings_are_the_same(
    written, again, finished
):
    place = again / "cells/ordered/seed0/fine-tuned"
    shutil.rmtree(place)
    train = jobs.Job.train

    def stop(job):
        train(job)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.Job, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            go(written(), again)
    assert not (place / "result.json").exists()
    found = go(written(), again)
    assert found.ran == ["ordered, seed 0, fine-tuned"]
    assert "going on from" in (place / "output.txt").read_text()
    assert accuracies(found.found) == accuracies(finished.found)


def test_a_cell_that_fails_is_told_and_the_others_go_on(written, again, capsys):
    wrong = ("rows:", "rows:\n  - {name: wrong, fusion_strategy: all, fusion_token: 9}")
    words = ["table", "--grid", str(written(wrong)), "--output_dir", str(again)]
    shutil.rmtree(again / "cells/ordered/seed1")
    assert console(words) == 2
    out, err = capsys.readouterr()
    assert "ordered, seed 1, fine-tuned: " in out
    assert "wrong, seed 0, training-free: failed: fusion_token is 9, expected at most" in out
    assert err.startswith(f"error: 4 of {CELLS + 4} cells failed: wrong, seed 0, training-free; ")
    assert err.count("\n") == 1
    assert {bool(line["error"]) for line in lines(again) if line["row"] == "wrong"} == {True}
    assert not [line for line in lines(again) if line["row"] != "wrong" and line["error"]]
    assert "Traceback" in (again / "cells/wrong/seed0/fine-tuned/output.txt").read_text()
    assert "| wrong | - | - | - | - | - | - | - | - |" in (again / "results.md").read_text()


def test_a_failed_cell_is_tried_again(written, again, monkeypatch):
    shutil.rmtree(again / "cells/ordered/seed1")
    with monkeypatch.context() as patch:
        error = DivergedError("loss is nan\nat update 3", update=3, loss=float("nan"))
        patch.setattr(jobs.Job, "train", lambda job: (_ for _ in ()).throw(error))
        found = go(written(), again)
    assert found.found["ordered, seed 1, fine-tuned"]["error"] == "loss is nan at update 3"
    assert go(written(), again).ran == ["ordered, seed 1, fine-tuned"]


def test_cells_of_a_dense_model_that_failed_fail_in_their_turn(written, tmp_path, monkeypatch):
    def fail(job):
        raise ValueError("no")

    monkeypatch.setattr(jobs.Job, "train", fail)
    found = go(written(("[0, 1]", "[0]")), tmp_path / "out").found
    assert found["dense, seed 0, dense"]["error"] == "no"
    message = "start is dense, seed 0, dense, expected a cell that is finished"
    assert found["ordered, seed 0, training-free"]["error"] == message


def test_the_tidy_table_has_a_line_for_each_cell(finished):
    found = lines(finished.folder)
    assert len(found) == CELLS
    keys = [(line["row"], line["seed"], line["phase"]) for line in found]
    assert len(set(keys)) == CELLS
    ordered = [line for line in found if line["row"] == "ordered"]
    assert {line["fusion_method"] for line in ordered} == {"ordered"}
    assert {line["fusion_method"] for line in found if line["row"] == "dense"} == {""}
    assert {line["token_layers"] for line in ordered} == {"0.8125"}
    assert {line["threads"] for line in found} == {"1"}
    for line in found:
        name = f"{line['row']}, seed {line['seed']}, {line['phase']}"
        assert float(line["acc1"]) == finished.found[name]["figures"]["acc1"]
        assert (
            bool(line["seconds"]) == bool(line["memory_mib"]) == (line["phase"] != "training-free")
        )
        assert "2026" <= line["started"] <= line["ended"]
        assert "torch " in line["versions"]


def made(acc1, seconds=4.0, error=None):
    figures = dict(
        acc1=acc1,
        acc5=99.0,
        token_layers=0.5,
        seconds_per_epoch=seconds,
        images_per_second=100.0,
        memory_mib=10.0,
        memory_kind="saved for backward",
    )
    about = dict(
        commit="abc+",
        started="2026-11-21T03:37:04+0000",
        platform="Linux",
        cpu_count=2,
        gpu=None,
        jobs=2,
        fambav="0.1.0",
        python="3.11.7",
        packages={"torch": "2.13.0"},
    )
    return {"figures": {} if error else figures, "error": error, "about": about}


def test_a_row_is_the_mean_and_the_sample_deviation_over_seeds(written):
    grid = experiments.read(written())
    found = {
        "dense, seed 0, dense": made(90.0),
        "dense, seed 1, dense": made(92.0),
        "ordered, seed 0, training-free": made(50.0),
        "ordered, seed 0, fine-tuned": made(80.0, 3.0),
        "ordered, seed 1, fine-tuned": made(83.0, 5.0),
    }
    text = experiments.rendered(grid, found, "markdown")
    dense, ordered = (
        line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [do]", line)
    )
    assert dense[:2] == ["dense", "0.500"]
    assert dense[3:] == ["91.00 ± 1.41", "-", "99.00 ± 0.00", "4.00 ± 0.00", "100", "10.0"]
    assert ordered[3:] == [
        "50.00 [1 of 2] (-40.00)",
        "81.50 ± 2.12",
        "99.00 ± 0.00 (+0.00)",
        "4.00 ± 1.41 (+0%)",
        "100",
        "10.0 (+0%)",
    ]
    assert "mean ± sample standard deviation over seeds 0, 1" in text
    assert "commit: abc+\n\ndate: 2026-11-21\n\nmachine: Linux, 2 cores, 2 processes" in text
    assert "versions: fambav 0.1.0, python 3.11.7, torch 2.13.0" in text
    assert "failed" not in text


def test_a_failed_cell_is_below_the_table(written):
    found = {"ordered, seed 0, fine-tuned": made(0.0, error="no")}
    text = experiments.rendered(experiments.read(written()), found, "text")
    assert text.endswith("failed: ordered, seed 0, fine-tuned")
    assert re.search(r"^ordered( +-){8}$", text, re.MULTILINE)


def test_the_command_prints_the_table_and_leaves_it(finished, written, again, capsys):
    words = ["table", "--grid", str(written()), "--output_dir", str(again)]
    assert console(words) == 0
    plain = capsys.readouterr().out
    assert console([*words, "--format", "markdown"]) == 0
    drawn, told = capsys.readouterr()
    assert told == f"{CELLS} of {CELLS} cells are finished\n"
    assert re.match(r"row +token-layers +MFLOPs +training-free %", plain.splitlines()[1])
    assert drawn == (again / "results.md").read_text()
    rows = [line.split(" | ")[0] for line in drawn.splitlines() if line.startswith("| ")]
    assert rows == ["| row", "| dense", "| ordered"]


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


def test_two_jobs_have_the_numbers_of_one(finished, written, tmp_path):
    found = go(written(), tmp_path / "out", jobs=2)
    assert sorted(found.ran) == sorted(finished.ran)
    assert accuracies(found.found) == pytest.approx(accuracies(finished.found))
    for log in finished.folder.rglob("log.txt"):
        other = tmp_path / "out" / log.relative_to(finished.folder)
        ours, theirs = (
            [json.loads(line)["train_loss"] for line in path.read_text().splitlines()]
            for path in (log, other)
        )
        assert ours == pytest.approx(theirs, rel=1e-5)


def children(pid):
    """Processes that a process has started and that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def at_work(pid):
    """Processes of a grid, each with the folder of the cell it works at."""
    found = []
    for child in children(pid):
        for link in Path(f"/proc/{child}/fd").glob("*"):
            with suppress(OSError):  # closed, or ended, since it was listed
                if link.readlink().name == "output.txt":
                    found.append((child, link.readlink().parent))
    return found


def until(condition, *, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def start(path, folder):
    words = ["table", "--grid", str(path), "--output_dir", str(folder), "--jobs", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "fambav", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job passes on that it does not heed an interruption.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_grid_leaves_no_process_and_goes_on(finished, written, tmp_path, blow):
    path, folder = written(), tmp_path / "out"
    process = start(path, folder)
    until(lambda: len(list(folder.rglob("result.json"))) >= 3)
    workers = children(process.pid)
    process.send_signal(blow)
    _, err = process.communicate(timeout=60)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert process.returncode == (130 if blow == signal.SIGINT else -signal.SIGKILL)
    assert err == ("interrupted\n" if blow == signal.SIGINT else "")
    before = {p: p.read_bytes() for p in folder.rglob("result.json")}
    assert 3 <= len(before) < CELLS
    found = go(path, folder, jobs=2)
    assert len(found.ran) == CELLS - len(before)
    assert all(p.read_bytes() == content for p, content in before.items())
    assert accuracies(found.found) == pytest.approx(accuracies(finished.found))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_of_a_killed_grid_do_not_finish_their_cells(written, place, tmp_path):
    base = (place / "base.yaml").read_text()
    (place / "long.yaml").write_text(base.replace("\nepochs: 1\n", "\nepochs: 100000\n"))
    folder = tmp_path / "out"
    process = start(written(("base.yaml", "long.yaml")), folder)
    until(lambda: len(list(folder.rglob("log.txt"))) == 2)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), seconds=20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_worker_that_dies_fails_its_cell_alone(written, tmp_path):
    folder = tmp_path / "out"
    process = start(written(), folder)
    until(lambda: at_work(process.pid))
    (pid, begun), *_ = at_work(process.pid)
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    record = json.loads((begun / "result.json").read_text())
    assert record["error"].startswith("process ended with status -9, expected a result")
    seed = record["seed"]
    assert err.startswith(f"error: {CELLS // 2} of {CELLS} cells failed: dense, seed {seed}, dense")
