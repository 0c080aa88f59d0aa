"""A disk that is full, or a write that fails: what was saved stays, and training goes on."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from fambav.engine import checkpoint, trainer
from tests.identical import assert_identical, assert_same_folders, log
from tests.trust.forked import run


def limited(size):
    """Let no file of this process grow beyond `size` bytes."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return prepare


def fails(times, number=errno.EIO):
    """Let these saves of checkpoints fail, counted from 1."""

    def prepare():
        real, calls = checkpoint.save, []

        def save(path, state):
            calls.append(1)
            if len(calls) in times:
                raise OSError(number, "the disk is gone", str(path))
            real(path, state)

        trainer.checkpoint.save = save

    return prepare


@pytest.mark.parametrize("times", [{1}, {2}, {1, 2}])
def test_a_failed_save_is_told_in_a_line_and_training_goes_on(whole, recipe, tmp_path, times):
    folder = tmp_path / "run"
    found = run(recipe, folder, fails(times))
    assert found.status == 0, found.out
    assert found.out.count("warning: checkpoint could not be written (the disk is gone)") == len(
        times
    )
    assert "Traceback" not in found.out
    assert_identical(folder, whole)


def test_only_a_failure_of_the_last_save_ends_with_status_4(recipe, tmp_path):
    folder = tmp_path / "run"
    found = run(recipe, folder, fails({3}))
    assert found.status == 4, found.out
    assert found.out.count("error: ") == 1
    assert "last state could not be written: the disk is gone" in found.out
    assert checkpoint.load(folder / "checkpoint.pth")["epoch"] == 1


def full_at(name, epochs):
    """Let the disk be full for one file from the time on when so many epochs are evaluated."""

    def prepare():
        scores, replace, opened, calls = trainer.Trainer._evaluate, Path.replace, Path.open, []

        def refuse(path):
            if len(calls) >= epochs and Path(path).name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def moved(path, target):
            refuse(target)
            return replace(path, target)

        def appended(path, mode="r", **options):
            if mode == "a":
                refuse(path)
            return opened(path, mode, **options)

        trainer.Trainer._evaluate = lambda *given: (calls.append(1), scores(*given))[1]
        Path.replace, Path.open = moved, appended

    return prepare


@pytest.fixture(scope="module")
def unbroken(whole, recipe, tmp_path_factory):
    """The folder of a run of 1 or 3 epochs that nothing interrupted."""
    short = tmp_path_factory.mktemp("short") / "run"
    assert run([*recipe, "--epochs", 1], short).status == 0
    return {1: short, 3: whole}.get


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("name", ["model.safetensors", "log.txt", "metrics.csv"])
def test_a_file_that_the_last_save_could_not_write_is_written_on_resume(
    recipe, tmp_path, name, epochs, unbroken
):
    whole, folder, words = unbroken(epochs), tmp_path / "run", [*recipe, "--epochs", epochs]
    found = run(words, folder, full_at(name, epochs))
    assert found.status == 4, found.out
    assert found.out.count("last state could not be written: no space left") == 1
    assert checkpoint.load(folder / "checkpoint.pth")["epoch"] == epochs - 1
    found = run([*words, "--resume", "auto"], folder, full_at("model.safetensors", 0))
    assert found.status == 4, found.out
    found = run([*words, "--resume", "auto"], folder)
    assert found.status == 0, found.out
    assert_same_folders(folder, whole)


@pytest.mark.parametrize("size", [10_000, 50_000, 200_000])
def test_on_a_full_disk_the_checkpoint_before_stays_whole(recipe, tmp_path, size):
    folder = tmp_path / "run"
    assert run([*recipe, "--epochs", "1"], folder).status == 0
    before = (folder / "checkpoint.pth").read_bytes()
    found = run([*recipe, "--seed", "1"], folder, limited(size))
    assert found.status == 4, found.out
    assert [line for line in found.out.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in found.out
    kept = next(folder.glob("earlier-*")) / "checkpoint.pth"
    assert kept.read_bytes() == before
    assert not list(folder.glob(".tmp-*"))


def test_resuming_on_a_full_disk_loses_nothing(whole, recipe, tmp_path):
    folder = tmp_path / "run"
    assert run([*recipe, "--save-every", "2"], folder, stop_after_two).status == 143
    before = checkpoint.load(folder / "checkpoint.pth")["updates"]
    found = run([*recipe, "--resume", "auto"], folder, limited(200_000))
    assert found.status == 4, found.out
    assert checkpoint.load(folder / "checkpoint.pth")["updates"] == before
    assert run([*recipe, "--resume", "auto"], folder).status == 0
    assert_identical(folder, whole)
    assert len(log(folder)) == 3


def stop_after_two():
    from fambav.engine.step import TrainStep
    from tests.trust.test_signals import asked_at

    asked_at(TrainStep, "__call__", 2, signal.SIGTERM)()
