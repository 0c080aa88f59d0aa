"""Another number of processes on resume: refused, or allowed and then the same."""

import pytest

from fambav.engine import checkpoint
from tests.identical import log
from tests.trust.forked import run, run_two

PLAIN = ["--mixup", "0", "--cutmix", "0"]


def test_another_number_of_processes_is_refused_with_both_numbers(recipe, tmp_path):
    folder = tmp_path / "run"
    assert run([*recipe, "--epochs", "1"], folder).status == 0
    words = [*recipe, "--epochs", "1", "--batch-size", "4", "--resume", "auto"]
    found = run_two(words, folder)
    assert found.status == [2, 2], found.out
    assert found.out.count("error: ") == 1
    assert "processes 1 -> 2 (see --allow-world-size-change)" in found.out


def test_with_the_flag_the_samples_come_in_the_same_order(recipe, tmp_path):
    """The losses of a run that goes on with two processes are those of one that stays alone."""
    words, folders = [*recipe, *PLAIN], [tmp_path / "one", tmp_path / "two"]
    assert run(words, folders[0]).status == 0
    import signal

    from fambav.engine.step import TrainStep
    from tests.trust.test_signals import asked_at

    assert run(words, folders[1], asked_at(TrainStep, "__call__", 3, signal.SIGUSR1)).status == 0
    assert checkpoint.load(folders[1] / "checkpoint.pth")["updates"] == 3
    more = ["--batch-size", "4", "--resume", "auto", "--allow-world-size-change"]
    found = run_two([*words, *more], folders[1])
    assert found.status == [0, 0], found.out
    ours, theirs = log(folders[1]), log(folders[0])
    for key in ("train_loss", "test_loss", "train_lr"):
        assert [x[key] for x in ours] == pytest.approx([x[key] for x in theirs], rel=1e-5), key


def test_with_the_flag_another_global_batch_is_still_refused(recipe, tmp_path):
    folder = tmp_path / "run"
    assert run([*recipe, "--epochs", "1"], folder).status == 0
    words = [*recipe, "--epochs", "1", "--resume", "auto", "--allow-world-size-change"]
    found = run_two(words, folder)
    assert found.status == [2, 2]
    assert "images per update 16 -> 32" in found.out
