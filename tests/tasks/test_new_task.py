"""A task that the package has never seen: trained, resumed, kept, evaluated, compared, exported."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fambav import experiments
from fambav.cli import console
from fambav.engine import checkpoint
from fambav.registry import DATA_SETS, FAMILIES, TASKS
from fambav.tasks import Meter, Metric, Task, task_of
from tests.data.made import made_cifar10
from tests.experiments.made import SCRATCH, written
from tests.identical import assert_identical, log
from tests.made import crash_in_update, crashing, go, refused


class Errors(Meter):
    """Sums of squared and of absolute errors of class probabilities."""

    def batch_sums(self, outputs, targets):
        errors = outputs.float().softmax(dim=1) - F.one_hot(targets, outputs.shape[1])
        return torch.stack([errors.square().double().sum(), errors.abs().double().sum()])

    def metrics(self, sums, samples):
        squared, absolute = (sums / samples).tolist()
        return {"loss": squared, "brier": squared, "distance": absolute}


class Calibration(Task):
    """Probabilities whose squared error is small."""

    hub = "image-classification"
    metrics = (
        Metric("brier", "Brier", "nat", "Brier score", higher_is_better=False, hub="brier_score"),
        Metric("distance", "distance", "", "total variation", higher_is_better=False),
    )

    def train_transform(self, *given):
        return TASKS["classification"].train_transform(*given)

    def eval_transform(self, *given):
        return TASKS["classification"].eval_transform(*given)

    def loss(self, config, *, mixed):
        return lambda outputs, targets: F.mse_loss(
            outputs.softmax(dim=1), F.one_hot(targets, outputs.shape[1]).float()
        )

    def meter(self, num_classes, device):
        return Errors(2, device)


TASKS.register("calibration")(Calibration())


@pytest.fixture(scope="module", autouse=True)
def named():
    task_of("CIFAR10")  # its file is read once
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA_SETS, "CIFAR10", "calibration")
        tasks = ("classification", "calibration")
        patch.setitem(FAMILIES, "vim", FAMILIES["vim"]._replace(tasks=tasks))
        yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    text = """--model vim_micro --input-size 16 --data-set CIFAR10 --num_workers 0 --batch-size 8
        --epochs 4 --warmup-epochs 0 --lr 3e-3 --unscale-lr --log_every 1 --no-repeated-aug
        --fusion-strategy upper --fusion-layer 4 --fusion-token 3"""
    return [*text.split(), "--data-path", str(made_cifar10(tmp_path_factory.mktemp("data")))]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    found = go(*flags, "--output_dir", folder)
    assert found.status == 0, found.err
    return folder, found.out


def test_log_and_lines_have_its_metrics_and_no_others(finished):
    folder, printed = finished
    for record in log(folder):
        names = {name for name in record if name.startswith("test_")}
        metrics = {"loss", "brier", "distance"}
        assert names == {f"test_{part}{name}" for part in ("", "ema_") for name in metrics}
    first, best = log(folder)[0], min(record["test_brier"] for record in log(folder))
    line = "* loss {test_loss:.3f} Brier {test_brier:.3f} distance {test_distance:.3f}"
    assert line.format(**first) in printed
    assert f"Best Brier: {best:.4g} nat" in printed
    assert "Acc@1" not in printed and "accuracy" not in printed


def test_the_lowest_value_is_the_best(finished):
    folder, _ = finished
    values = [record["test_brier"] for record in log(folder)]
    assert values[0] != min(values), "the best one is not just the first"
    best = checkpoint.load(folder / "best_checkpoint.pth")
    assert (best["epoch"], best["best_brier"]) == (values.index(min(values)), min(values))
    assert checkpoint.load(folder / "checkpoint.pth")["best_brier"] == min(values)


def test_a_resumed_run_is_bit_identical(finished, flags, tmp_path):
    folder, _ = finished
    with crashing(partial(crash_in_update, update=7)):
        go(*flags, "--output_dir", tmp_path)
    assert go(*flags, "--output_dir", tmp_path, "--resume", "auto").status == 0
    assert_identical(tmp_path, folder)


def test_an_evaluation_repeats_the_last_scores(finished, flags):
    folder, _ = finished
    printed = go(*flags, "--eval", "--resume", folder / "checkpoint.pth").out
    last = log(folder)[-1]["test_brier"]
    assert f" Brier {last:.3f} " in printed
    assert f"Brier score on the 20 test samples: {last:.4g} nat" in printed


def test_a_checkpoint_without_the_metric_is_refused(finished, flags, tmp_path):
    folder, _ = finished
    state = checkpoint.load(folder / "checkpoint.pth")
    del state["history"][0]["test_brier"]
    checkpoint.save(tmp_path / "checkpoint.pth", state)
    line = refused(*flags, "--resume", tmp_path / "checkpoint.pth")
    assert "does not hold the state of this run ('test_brier')" in line


def test_a_table_has_its_columns_and_refuses_runs_of_another_task(finished, capsys):
    folder, _ = finished
    assert console(["table", str(folder), "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    last = log(folder)[-1]
    assert (row["brier"], row["distance"]) == (last["test_brier"], last["test_distance"])
    assert row["ema_brier"] == last["test_ema_brier"] and "acc1" not in row
    assert console(["table", str(folder), str(folder)]) == 0
    head = capsys.readouterr().out
    assert "Brier nat" in head and "EMA nat" in head


def test_runs_of_several_tasks_stand_in_no_table(finished, tmp_path, capsys):
    folder, _ = finished
    for path in folder.iterdir():
        if path.suffix in (".txt", ".json", ".yaml"):
            text = path.read_text().replace("CIFAR10", "CIFAR").replace("test_brier", "test_acc1")
            (tmp_path / path.name).write_text(text)
    assert console(["table", str(folder), str(tmp_path), "--mixed"]) == 2
    assert "by top-1 accuracy and run by Brier score, expected runs of one task" in (
        capsys.readouterr().err
    )


def test_the_table_of_a_grid_has_its_columns(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "CIFAR", "calibration")
    grid = experiments.read_grid(written(tmp_path, SCRATCH))
    head = experiments.table(experiments.Results(grid, {})).head
    assert {"Brier nat", "distance"} < set(head) and "top-1 %" not in head


def test_a_report_says_which_run_is_best(finished, tmp_path, monkeypatch):
    worse, better = finished[0], tmp_path / "better"
    shutil.copytree(worse, better)
    text = (better / "log.txt").read_text()
    (better / "log.txt").write_text(re.sub('"test_brier": [0-9.]+', '"test_brier": 0.25', text))
    target = tmp_path / "report.html"
    words = [
        "report",
        str(worse),
        str(better),
        "--mixed",
        "--output",
        str(target),
    ]
    assert console(words) == 0
    assert "better reaches a held-out Brier score of 0.25 nat" in target.read_text()
    assert "Accuracy by class" not in target.read_text()


def test_a_task_without_classes_is_evaluated_but_not_by_class(finished, tmp_path, capsys):
    folder, printed = finished
    assert console(["evaluate", str(folder)]) == 0
    line, summary = capsys.readouterr().out.splitlines()
    best = min(record["test_brier"] for record in log(folder))
    assert line in printed and f" Brier {best:.3f} " in line
    assert summary == f"Brier score on the 20 test samples: {best:.4g} nat"
    assert console(["evaluate", str(folder), "--predictions", str(tmp_path / "p.csv")]) == 2
    assert capsys.readouterr().err == (
        "error: data_set is 'CIFAR10', expected one whose task has classes\n"
    )
    assert not list(tmp_path.iterdir())


def test_an_exported_model_names_the_task_and_its_metric(finished, tmp_path):
    folder, _ = finished
    target = tmp_path / "exported"
    assert console(["export", str(folder), "--output_dir", str(target), "--format", "hf"]) == 0
    run = json.loads((target / "config.json").read_text())["fambav"]["run"]
    best = min(record["test_brier"] for record in log(folder))
    assert run["brier"] == best and "acc1" not in run
    assert "type: brier_score" in (target / "README.md").read_text()


@pytest.mark.parametrize("task", ["classification", "calibration"])
def test_shares_of_processes_add_up_to_the_whole_set(task):
    torch.manual_seed(0)
    outputs, targets = torch.randn(23, 10), torch.randint(10, (23,))
    whole, *shares = (TASKS[task].meter(10, torch.device("cpu")) for _ in range(3))
    assert whole.update(outputs, targets)
    for rank, share in enumerate(shares):
        share.update(outputs[rank::2], targets[rank::2])
    shares[0].sums += shares[1].sums
    assert shares[0].scores().samples == 23
    assert shares[0].scores().metrics == pytest.approx(whole.scores().metrics, rel=1e-12)
    assert not whole.update(outputs * torch.nan, targets)
