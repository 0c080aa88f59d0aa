"""The loop over epochs, with a model of one number."""

import errno

import pytest
import torch
from torch import nn

from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from fambav.engine.console import Console
from fambav.engine.distributed import Processes
from fambav.engine.memory import PeakMemory
from fambav.engine.optim import Average
from fambav.engine.precision import Precision
from fambav.engine.progress import Progress, restore, snapshot
from fambav.engine.run_dir import Recorder
from fambav.engine.step import TrainStep
from fambav.engine.trainer import Trainer
from fambav.tasks import Scores, task_of
from tests.identical import scalars

CPU = torch.device("cpu")
TASK = task_of("DIGITS")
IMAGES = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def make_step(*, average=True, dtype=None):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    return TrainStep(
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
    step, scores = make_step(average=average), iter(accuracies)

    def evaluate(model, take):
        accuracy = next(scores) if model is step.model else 1.0
        return Scores({"loss": 0.5, "acc1": accuracy, "acc5": 99.0}, samples=8)

    return Trainer(
        task=TASK,
        step=step,
        batches=iter([(IMAGES, torch.tensor([0, 1]))] * 100),
        sample_indices=lambda update: {"samples": [[[update, update + 1]]]},
        updates=4,
        images=2,
        epochs=len(accuracies),
        evaluate=evaluate,
        facts={"class_token": "middle"},
        strings={"class_token": "middle"},
        unreadable=lambda: 0,
        tokens=(5, 3),
        peak_memory=PeakMemory(CPU, step.model.parameters()),
        console=Console(silent=True),
        progress=Progress(),
        recorder=None if folder is None else Recorder(folder, [], updates=0, warn=print),
        log_every=3,
    )


def test_updates_are_counted_from_the_start_of_the_run(monkeypatch):
    trainer, seen = make(), []
    real = TrainStep.__call__
    monkeypatch.setattr(
        TrainStep,
        "__call__",
        lambda self, b, number: (seen.append(number), real(self, b, number))[1],
    )
    trainer.run()
    assert seen == list(range(12))
    seen.clear()
    later = make(accuracies=(10.0, 30.0, 20.0))
    later.progress.epochs = 2
    later.run()
    assert seen == list(range(8, 12))


def test_best_is_by_the_raw_weights_and_stays_through_worse_epochs(tmp_path):
    trainer = make(tmp_path)
    trainer.run()
    trainer.recorder.close()
    best, last = (checkpoint.load(tmp_path / f"{n}.pth") for n in ("best_checkpoint", "checkpoint"))
    assert (best["epoch"], last["epoch"]) == (1, 2)
    assert best["best_acc1"] == last["best_acc1"] == 30.0
    assert last["class_token"] == "middle"
    weights = checkpoint.load(tmp_path / "model.safetensors")["model"]
    assert torch.equal(weights["weight"], trainer.step.model.weight)


def test_records_hold_the_rates_the_scores_and_the_tokens():
    trainer = make()
    trainer.run()
    first = trainer.progress.history[0]
    assert first["train_lr"] == pytest.approx(0.025)
    assert (first["test_acc1"], first["test_ema_acc1"], first["test_acc5"]) == (10.0, 1.0, 99.0)
    assert first["tokens"] == [5, 3]
    assert first["n_parameters"] == 6
    assert first["images_per_second"] > 0


def test_without_an_average_nothing_is_said_of_one():
    trainer = make(average=False)
    trainer.run()
    assert not [key for key in trainer.progress.history[0] if "ema" in key]
    assert snapshot(trainer.step, trainer.progress, TASK)["model_ema"] is None


def test_a_snapshot_puts_everything_back():
    trainer = make()
    trainer.run()
    state = snapshot(trainer.step, trainer.progress, TASK)
    other = make_step()
    assert restore(state, other, TASK) == trainer.progress
    for name in ("model", "average"):
        one, two = (getattr(u, name) for u in (trainer.step, other))
        one, two = (getattr(m, "model", m).state_dict() for m in (one, two))
        assert all(torch.equal(one[key], two[key]) for key in one)
    found = other.optimizer.state_dict()["state"][0]
    assert found["step"] == 12
    assert torch.equal(found["exp_avg"], trainer.step.optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_snapshot_puts_the_loss_scale_back():
    update, other = make_step(dtype=torch.float16), make_step(dtype=torch.float16)
    for number, size in enumerate([1e3, 1.0, 1.0]):  # the gradient of the first one overflows
        update(iter([(size * IMAGES, torch.tensor([1, 0]))]), number)
    state = snapshot(update, Progress(), TASK)
    assert state["scaler"]["scale"] == 2.0**15
    assert state["scaler"]["_growth_tracker"] == 2
    restore(state, other, TASK)
    assert other.precision.scaler.state_dict() == state["scaler"]
    for one in (update, other):
        one(iter([(IMAGES, torch.tensor([0, 1]))]), 3)
    ours, theirs = (snapshot(one, Progress(), TASK)["scaler"] for one in (update, other))
    assert ours == theirs
    assert ours["_growth_tracker"] == 3


def test_every_loss_is_an_event_whenever_the_run_is_saved(tmp_path):
    trainer = make(tmp_path)
    trainer.save_every = 2
    trainer.run()
    trainer.recorder.close()
    assert [step for step, _ in scalars(tmp_path)["update/loss"]] == list(range(12))


def test_the_best_checkpoint_is_kept_later_where_it_could_not_be_at_once(tmp_path, monkeypatch):
    real, failed = checkpoint.copy, []

    def copy(source, target):
        if (
            target.name == "best_checkpoint.pth"
            and len(failed) < 2
            and trainer.progress.epochs >= 2
        ):
            failed.append(target)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(checkpoint, "copy", copy)
    trainer = make(tmp_path, accuracies=(10.0, 30.0, 20.0, 15.0))
    trainer.run()
    trainer.recorder.close()
    assert len(failed) == 2
    epochs = [
        checkpoint.load(tmp_path / f"{name}checkpoint.pth")["epoch"]
        for name in ("best_", "previous_", "")
    ]
    assert epochs == [1, 1, 3]


@pytest.mark.parametrize("part", ["model", "optimizer", "model_ema", "epoch", "history"])
@pytest.mark.parametrize("value", [None, {"a": 1}])
def test_a_state_of_something_else_is_refused_in_one_line(part, value):
    trainer = make()
    trainer.run()
    state = snapshot(trainer.step, trainer.progress, TASK)
    with pytest.raises(CheckpointError, match=r"^checkpoint does not hold the state [^\n]*$"):
        restore({**state, part: value}, make_step(), TASK)
    del state[part]
    with pytest.raises(CheckpointError, match=r"^checkpoint does not hold the state [^\n]*$"):
        restore(state, make_step(), TASK)
