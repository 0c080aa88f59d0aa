"""The loop over epochs, with a model of one number."""

import errno

import pytest
import torch
from torch import nn

from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from fambav.engine.evaluate import Scores
from fambav.engine.fit import Fit, Progress, restore, snapshot
from fambav.engine.memory import Meter
from fambav.engine.optim import Average
from fambav.engine.run_dir import Recorder
from fambav.engine.runtime import Console, Precision, Processes
from fambav.engine.train import Update
from tests.identical import scalars

CPU = torch.device("cpu")
IMAGES = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def make_update(*, average=True, dtype=None):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    return Update(
        model=model,
        forward=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        loss=nn.functional.cross_entropy,
        lr=lambda done: 0.01 * (done + 1),
        seed=lambda done, place: None,
        precision=Precision(CPU, dtype),
        processes=Processes(0, 1, CPU),
        average=Average(model, decay=0.9) if average else None,
    )


def make(folder=None, *, accuracies=(10.0, 30.0, 20.0), average=True):
    update, scores = make_update(average=average), iter(accuracies)

    def score(model, take):
        accuracy = next(scores) if model is update.model else 1.0
        return Scores(acc1=accuracy, acc5=99.0, loss=0.5, samples=8)

    return Fit(
        update=update,
        batches=iter([(IMAGES, torch.tensor([0, 1]))] * 100),
        places=lambda update: {"samples": [[[update, update + 1]]]},
        updates=4,
        images=2,
        epochs=len(accuracies),
        score=score,
        facts={"class_token": "middle"},
        strings={"class_token": "middle"},
        left_out=lambda: 0,
        tokens=(5, 3),
        meter=Meter(CPU, update.model.parameters()),
        console=Console(silent=True),
        progress=Progress(),
        recorder=None if folder is None else Recorder(folder, [], updates=0, warn=print),
        every=3,
    )


def test_updates_are_counted_from_the_start_of_the_run(monkeypatch):
    fit, seen = make(), []
    real = Update.__call__
    monkeypatch.setattr(
        Update, "__call__", lambda self, b, number: (seen.append(number), real(self, b, number))[1]
    )
    fit()
    assert seen == list(range(12))
    seen.clear()
    later = make(accuracies=(10.0, 30.0, 20.0))
    later.progress.epochs = 2
    later()
    assert seen == list(range(8, 12))


def test_best_is_by_the_raw_weights_and_stays_through_worse_epochs(tmp_path):
    fit = make(tmp_path)
    fit()
    fit.recorder.close()
    best, last = (checkpoint.load(tmp_path / f"{n}.pth") for n in ("best_checkpoint", "checkpoint"))
    assert (best["epoch"], last["epoch"]) == (1, 2)
    assert best["best_acc1"] == last["best_acc1"] == 30.0
    assert last["class_token"] == "middle"
    weights = checkpoint.load(tmp_path / "model.safetensors")["model"]
    assert torch.equal(weights["weight"], fit.update.model.weight)


def test_records_hold_the_rates_the_scores_and_the_tokens():
    fit = make()
    fit()
    first = fit.progress.history[0]
    assert first["train_lr"] == pytest.approx(0.025)
    assert (first["test_acc1"], first["test_ema_acc1"], first["test_acc5"]) == (10.0, 1.0, 99.0)
    assert first["tokens"] == [5, 3]
    assert first["n_parameters"] == 6
    assert first["images_per_second"] > 0


def test_without_an_average_nothing_is_said_of_one():
    fit = make(average=False)
    fit()
    assert not [key for key in fit.progress.history[0] if "ema" in key]
    assert snapshot(fit.update, fit.progress)["model_ema"] is None


def test_a_snapshot_puts_everything_back():
    fit = make()
    fit()
    state = snapshot(fit.update, fit.progress)
    other = make_update()
    assert restore(state, other) == fit.progress
    for name in ("model", "average"):
        one, two = (getattr(u, name) for u in (fit.update, other))
        one, two = (getattr(m, "model", m).state_dict() for m in (one, two))
        assert all(torch.equal(one[key], two[key]) for key in one)
    found = other.optimizer.state_dict()["state"][0]
    assert found["step"] == 12
    assert torch.equal(found["exp_avg"], fit.update.optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_snapshot_puts_the_loss_scale_back():
    update, other = make_update(dtype=torch.float16), make_update(dtype=torch.float16)
    for number, size in enumerate([1e3, 1.0, 1.0]):  # the gradient of the first one overflows
        update(iter([(size * IMAGES, torch.tensor([1, 0]))]), number)
    state = snapshot(update, Progress())
    assert state["scaler"]["scale"] == 2.0**15
    assert state["scaler"]["_growth_tracker"] == 2
    restore(state, other)
    assert other.precision.scaler.state_dict() == state["scaler"]
    for one in (update, other):
        one(iter([(IMAGES, torch.tensor([0, 1]))]), 3)
    ours, theirs = (snapshot(one, Progress())["scaler"] for one in (update, other))
    assert ours == theirs
    assert ours["_growth_tracker"] == 3


def test_every_loss_is_an_event_whenever_the_run_is_saved(tmp_path):
    fit = make(tmp_path)
    fit.save_every = 2
    fit()
    fit.recorder.close()
    assert [step for step, _ in scalars(tmp_path)["update/loss"]] == list(range(12))


def test_the_best_checkpoint_is_kept_later_where_it_could_not_be_at_once(tmp_path, monkeypatch):
    real, failed = checkpoint.copy, []

    def copy(source, target):
        if target.name == "best_checkpoint.pth" and len(failed) < 2 and fit.progress.epochs >= 2:
            failed.append(target)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(checkpoint, "copy", copy)
    fit = make(tmp_path, accuracies=(10.0, 30.0, 20.0, 15.0))
    fit()
    fit.recorder.close()
    assert len(failed) == 2
    epochs = [
        checkpoint.load(tmp_path / f"{name}checkpoint.pth")["epoch"]
        for name in ("best_", "previous_", "")
    ]
    assert epochs == [1, 1, 3]


@pytest.mark.parametrize("part", ["model", "optimizer", "model_ema", "epoch", "history"])
@pytest.mark.parametrize("value", [None, {"a": 1}])
def test_a_state_of_something_else_is_refused_in_one_line(part, value):
    fit = make()
    fit()
    state = snapshot(fit.update, fit.progress)
    with pytest.raises(CheckpointError, match=r"^checkpoint does not hold the state [^\n]*$"):
        restore({**state, part: value}, make_update())
    del state[part]
    with pytest.raises(CheckpointError, match=r"^checkpoint does not hold the state [^\n]*$"):
        restore(state, make_update())
