"""Numbers of epochs at trackers of other people."""

import sys
from types import SimpleNamespace

import pytest

from fambav.engine.tracker import Tracker, check_tracker
from tests.made import go

RUN = """--model vim_micro --input-size 16 --data-set DIGITS --batch-size 128 --num_workers 0
    --threads 1 --warmup-epochs 0"""


class Wandb:
    """Stands in for the package: remembers what each run was sent."""

    def __init__(self):
        self.runs, self.given = {}, []

    def init(self, **given):
        name = given["id"] or f"run{len(self.runs)}"
        self.given.append(given)
        sent = self.runs.setdefault(name, [])
        return SimpleNamespace(
            id=name,
            log=lambda values, step: sent.append((step, values)),
            finish=lambda: sent.append("finished"),
        )


def test_epochs_are_sent_under_their_keys_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("fambav.engine.tracker.find_spec", lambda name: name)
    flags = [*RUN.split(), "--tracker", "wandb", "--output_dir", tmp_path]
    for epochs in ("1", "2"):
        found = go(*flags, "--epochs", epochs, "--resume", "auto", "--extend")
        assert found.status == 0, found.err
    ((name, sent),) = wandb.runs.items()
    assert [given["id"] for given in wandb.given] == [None, name]
    assert wandb.given[0]["name"] == tmp_path.name
    assert wandb.given[0]["config"]["model"] == "vim_micro"
    (first, values), end, (second, _), last = sent
    assert (first, second, end, last) == (0, 1, "finished", "finished")
    assert {"test_acc1", "train_loss", "peak_memory_mib"} <= values.keys()


def test_a_tracker_that_fails_is_said_once_and_ends_no_run(tmp_path):
    def init(**_):
        raise ConnectionError("no\nnetwork")

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
        tracker = Tracker("wandb", tmp_path, {}, warn=said.append)
    tracker.epoch({"test_acc1": 1.0}, 0)
    tracker.close()
    assert said == ["warning: nothing more is sent to wandb (no network)"]
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("fambav.engine.tracker.find_spec", lambda name: None)
    folder = tmp_path / "run"
    found = go(*RUN.split(), "--epochs", "1", "--tracker", "mlflow", "--output_dir", folder)
    assert found.status == 2
    expected = "error: tracker is 'mlflow', expected an installed one; pip install mlflow"
    assert found.err.splitlines() == [expected]
    assert not folder.exists()


def test_the_default_sends_nothing_elsewhere(tmp_path):
    check_tracker("tensorboard")
    Tracker("tensorboard", tmp_path, {}, warn=pytest.fail).epoch({"test_acc1": 1.0}, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.extra("mlflow")
def test_mlflow_has_the_metrics_of_a_run_that_was_resumed(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    folder = tmp_path / "run"
    folder.mkdir()
    for epoch in (0, 1):
        tracker = Tracker("mlflow", folder, {"model": "vim_micro"}, warn=pytest.fail)
        tracker.epoch({"test_acc1": 10.0 + epoch}, epoch)
        tracker.close()
    (run,) = mlflow.search_runs(output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "test_acc1")
    assert [(metric.step, metric.value) for metric in history] == [(0, 10.0), (1, 11.0)]
    assert run.data.params == {"model": "vim_micro"}
    assert run.data.tags["mlflow.runName"] == "run"


def test_a_damaged_name_of_a_run_is_said_and_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    (tmp_path / "tracker.json").write_text("[[[")
    said = []
    Tracker("wandb", tmp_path, {}, warn=said.append).epoch({"test_acc1": 1.0}, 0)
    (line,) = said
    assert line.startswith("warning: nothing more is sent to wandb (")
    assert "tracker.json" in line
