"""Grids trained from scratch: kills, two at once, other machines, and the GPU of a process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fambav
from fambav import experiments
from fambav.cli import console
from fambav.engine.lock import locked
from fambav.experiments import results, workers
from tests.data.made import made_cifar

ROOT = Path(fambav.__file__).parents[1]
BASE = """model: vim_micro
input_size: 16
class_token: none
data_set: CIFAR
data_path: {folder}
num_workers: 0
batch_size: 8
epochs: {epochs}
warmup_epochs: 0
lr: 1.0e-3
unscale_lr: true
repeated_aug: false
model_ema: false
"""
GRID = """train: scratch
base: base.yaml
seeds: [0]
rows:
  - {name: none, fusion_strategy: none}
  - {name: upper, fusion_strategy: upper, fusion_layer: 4, fusion_token: 3}
"""
CELLS = ["none, seed 0, scratch", "upper, seed 0, scratch"]


def written(folder, *, epochs=2):
    made_cifar(folder, train=16, test=37, classes=3)
    (folder / "base.yaml").write_text(BASE.format(folder=folder, epochs=epochs))
    (folder / "grid.yaml").write_text(GRID)
    return folder / "grid.yaml"


def go(path, folder, **given):
    said = []
    grid = experiments.read(path)
    found = experiments.run(grid, folder, **{"jobs": 1, "keep": False, "say": said.append, **given})
    ran = [line.split("] ")[1].split(": ")[0] for line in said if line.startswith("[")]
    return found, ran


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return written(tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def finished(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    found, ran = go(path, folder)
    return folder, found, ran


def until(condition, *, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def losses(folder):
    return {
        str(log.relative_to(folder)): [
            json.loads(line)[name]
            for line in log.read_text().splitlines()
            for name in ("train_loss", "test_loss", "test_acc1")
        ]
        for log in folder.rglob("log.txt")
    }


def test_every_row_is_trained_from_scratch_and_leaves_no_weights(finished):
    folder, found, ran = finished
    assert ran == CELLS
    assert not [p for p in folder.rglob("*") if p.suffix in (".pth", ".safetensors")]
    for name in CELLS:
        assert found[name]["figures"]["epochs"] == 2
        assert found[name]["figures"]["acc5"] == 100.0
        assert not found[name]["resumed"]
    ours = losses(folder)
    assert len(ours) == 2
    assert ours["cells/none/seed0/scratch/log.txt"] != ours["cells/upper/seed0/scratch/log.txt"]


def test_a_finished_grid_gives_its_table_in_every_format_and_trains_nothing(finished, path, capsys):
    folder, _, _ = finished
    for form, start in {
        "text": "2 of 2 cells are finished\nrow ",
        "markdown": "| row |",
        "latex": "% needs",
        "csv": "row,fusion_strategy,",
        "json": '{\n "grid": "grid",',
    }.items():
        words = ["table", str(path), "--output_dir", str(folder), "--format", form]
        assert console(words) == 0
        out, err = capsys.readouterr()
        assert out.startswith(start)
        assert (err == "") == (form == "text")


def test_a_grid_of_another_machine_is_refused_before_anything_runs(
    finished, path, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "out"
    go(path, folder)
    (folder / "cells/upper/seed0/scratch/result.json").unlink()
    words = ["table", "--grid", str(path), "--output_dir", str(folder), "--jobs", "2"]
    assert console(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(r"error: cells in .* differ in jobs \(1, 2\), expected one machine", err)
    assert not (folder / "cells/upper/seed0/scratch/result.json").exists()
    assert console([*words, "--mixed"]) == 0
    out = capsys.readouterr().out
    assert "train s" not in out
    assert "memory" not in out
    assert "top-1 %" in out
    assert console(words) == 2


def test_a_cell_that_was_begun_on_another_machine_is_begun_anew(path, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    task = results.Task(experiments.read(path).cells[0], folder, False, {"cpu": "EPYC"})
    place = folder / task.cell.place
    results._make(place, task)
    (place / "log.txt").write_text("{}")
    results._make(place, task)
    assert (place / "log.txt").exists()
    results._make(place, task._replace(about={"cpu": "Xeon"}))
    assert not (place / "log.txt").exists()


def test_a_name_is_looked_up_where_grids_lie_and_its_runs_have_its_name(
    path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("fambav.registry.grids", lambda: {"tiny": path})
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


def test_a_folder_is_worked_in_by_one_process_at_a_time(path, tmp_path):
    held = "from fambav.engine.lock import locked\nfrom pathlib import Path\nimport sys\n"
    held += (
        f"with locked(Path({str(tmp_path)!r})):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", held], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"in\n"
        (tmp_path / ".tmp-1").touch()  # of the other, which may be writing it
        message = f"expected a folder that no other run writes to; process {other.pid} on"
        with pytest.raises(ValueError, match=message):
            go(path, tmp_path)
        assert not (tmp_path / "results.csv").exists()
        assert (tmp_path / ".tmp-1").exists()
    finally:
        other.kill()
        other.communicate(timeout=60)
    with locked(tmp_path):
        pass


def test_each_process_gets_a_gpu_of_its_own_and_shares_them_in_turn():
    assert workers.variables(2, []) == workers.variables(2, ["0"]) == [{}, {}]
    named = [found["CUDA_VISIBLE_DEVICES"] for found in workers.variables(3, ["4", "GPU-ab"])]
    assert named == ["4", "GPU-ab", "4"]


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 3, ["0", "1", "2"]), ("5,3", 2, ["5", "3"]), ("", 0, []), (None, 0, [])],
)
def test_gpus_are_named_as_the_environment_names_them(monkeypatch, visible, count, expected):
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers.gpus() == expected


def test_there_are_as_many_jobs_as_gpus_unless_the_user_says_otherwise(finished, path, monkeypatch):
    seen = []

    def stop(grid, folder, **given):
        seen.append(given["jobs"])
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "run", stop)
    for names, words in ((["0", "1", "2"], []), (["0"], []), ([], []), (["0", "1"], ["--jobs=1"])):
        monkeypatch.setattr(experiments, "gpus", lambda names=names: names)
        console(["table", str(path), "--output_dir", "x", *words])
    assert seen == [3, 1, 1, 1]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_the_gpu_of_a_process_is_in_its_environment_before_it_runs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    started = [workers.Worker({"CUDA_VISIBLE_DEVICES": name}) for name in ("6", "7")]
    try:
        for worker, name in zip(started, ("6", "7"), strict=True):
            wanted, place = f"CUDA_VISIBLE_DEVICES={name}", Path(f"/proc/{worker.pid}/environ")
            until(lambda: wanted in place.read_text().split("\0"), seconds=20)  # noqa: B023
    finally:
        for worker in started:
            worker.end()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"


@pytest.mark.slow
def test_a_grid_that_is_killed_in_the_middle_of_a_cell_goes_on_with_the_same_numbers(tmp_path):
    path = written(tmp_path, epochs=12)
    whole, _ = go(path, tmp_path / "whole", jobs=1)
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "fambav", "table", str(path), "--output_dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    begun = folder / "cells/upper/seed0/scratch"
    until(lambda: (begun / "log.txt").exists() and (begun / "log.txt").read_text().count("\n") > 2)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (begun / "result.json").exists()
    left = (begun / "log.txt").read_text().count("\n")
    assert 2 < left < 12
    found, ran = go(path, folder)
    assert ran == ["upper, seed 0, scratch"]
    assert found[ran[0]]["resumed"]
    assert "going on from" in (begun / "output.txt").read_text()
    ours, theirs = losses(folder), losses(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-5), name
    for name in CELLS:
        assert found[name]["figures"]["acc1"] == whole[name]["figures"]["acc1"]
        assert found[name]["figures"]["memory_mib"] == whole[name]["figures"]["memory_mib"]
