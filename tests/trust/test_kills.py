"""Killed at any moment, a run goes on to the same bits."""

import random
import shutil
import sys
import time

import pytest

from fambav.engine import checkpoint, trainer
from fambav.engine.run_dir import Recorder
from fambav.engine.step import TrainStep
from tests.identical import assert_same_folders, same
from tests.trust import forked
from tests.trust.forked import dies, run

KILLS = 5


def at_call(owner, name, number, *, after=False):
    """Die at the start, or the end, of the `number`-th call of a function from 1."""

    def prepare():
        real, calls = getattr(owner, name), []

        def counted(*given, **named):
            calls.append(1)
            if len(calls) == number and not after:
                dies()
            result = real(*given, **named)
            if len(calls) == number:
                dies()
            return result

        setattr(owner, name, counted)

    return prepare


def in_the_middle_of_a_write():
    """Die when half of the second checkpoint is in its file."""
    real, calls = checkpoint.Path.write_bytes, []

    def half(path, content):
        calls.append(1)
        if len(calls) == 3:  # of an epoch: the checkpoint, the weights
            real(path, bytes(content)[: len(content) // 2])
            dies()
        return real(path, content)

    checkpoint.Path.write_bytes = half


def in_the_middle_of_a_log_line():
    from fambav.engine import run_dir

    real, calls = run_dir._append, []

    def half(path, text):
        calls.append(1)
        if len(calls) == 4:  # of an epoch: the table, the log
            with path.open("a") as file:
                file.write(text[: len(text) // 2])
                file.flush()
            dies()
        real(path, text)

    run_dir._append = half


def _append_between(number):
    from fambav.engine import run_dir

    return at_call(run_dir, "_append", number)


POINTS = {
    "before the first update": at_call(TrainStep, "__call__", 1),
    "in the middle of an epoch": at_call(TrainStep, "__call__", 4),
    "in an evaluation": at_call(trainer.Trainer, "_evaluate", 2),
    "before the temporary file": at_call(checkpoint.tempfile, "mkstemp", 12),
    "in the middle of a write": in_the_middle_of_a_write,
    "after the write, before it is on the disk": at_call(checkpoint, "_sync", 15),
    "on the disk, before the rename": at_call(checkpoint.Path, "replace", 9),
    "after the rename": at_call(checkpoint.Path, "replace", 9, after=True),
    "after the previous one is kept": at_call(checkpoint, "copy", 2, after=True),
    "after the checkpoint, before its followers": at_call(checkpoint, "save", 2, after=True),
    "after the weights, before the log": at_call(checkpoint, "save_weights", 2, after=True),
    "at the log": at_call(Recorder, "epoch", 2),
    "between table and log": _append_between(4),
    "in the middle of a log line": in_the_middle_of_a_log_line,
}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_this_point_goes_on_to_the_same_bits(whole, recipe, tmp_path, point):
    folder = tmp_path / "run"
    words = [*recipe, "--save-every", "1"] if "update" in point or "epoch" in point else recipe
    died = run(words, folder, POINTS[point])
    assert died.status == -9, f"the point was never reached: {died.out}"
    found = run([*recipe, "--resume", "auto"], folder)
    assert found.status == 0, found.out
    assert_same_folders(folder, whole)


def finished(folder, epochs):
    path = folder / "checkpoint.pth"
    return path.exists() and checkpoint.load(path)["epoch"] == epochs - 1


def same_weights(folder, other):
    ours, theirs = (place / "model.safetensors" for place in (folder, other))
    return ours.exists() and same(checkpoint.load(ours)["model"], checkpoint.load(theirs)["model"])


def copied_in_the_last_save(folder, copies, epochs):
    """Copy the run folder as a kill would leave it: before each change to it in the last save.

    Copies that differ in nothing but temporary files count once.
    """

    def prepare():
        real, calls, seen, busy = trainer.Trainer._evaluate, [], [], []

        def counted(*given):
            calls.append(1)
            return real(*given)

        def copied(event, given):
            if (
                len(calls) < epochs
                or busy
                or event.partition(".")[0] not in ("open", "os", "shutil")
            ):
                return
            busy.append(event)
            files = {
                path.name: path.read_bytes()
                for path in sorted(folder.iterdir())
                if not path.name.startswith((".tmp-", "events."))
            }
            if files not in seen:
                seen.append(files)
                shutil.copytree(folder, copies / str(len(seen)))
            busy.clear()

        trainer.Trainer._evaluate = counted
        sys.addaudithook(copied)

    return prepare


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_killed_at_any_moment_of_its_last_save_goes_on_to_the_same_files(
    recipe, tmp_path, epochs
):
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    words = [*recipe, "--epochs", epochs]
    found = run(words, whole, copied_in_the_last_save(whole, copies, epochs))
    assert found.status == 0, found.out
    moments = sorted(copies.iterdir())
    assert len(moments) >= 5
    assert any(finished(p, epochs) and not same_weights(p, whole) for p in moments)
    for place in moments:
        found = run([*words, "--resume", "auto"], place)
        assert found.status == 0, found.out
        assert_same_folders(place, whole)


def test_a_run_killed_at_random_moments_goes_on_to_the_same_bits(recipe, tmp_path):
    """Each run is killed once, at any moment of the time that it takes here."""
    draw, killed, late = random.Random(7), 0, 0
    words = [*recipe, "--save-every", "2"]
    start = time.monotonic()
    assert run(words, tmp_path / "whole").status == 0
    seconds = time.monotonic() - start
    while killed < KILLS:
        folder = tmp_path / f"run{killed + late}"
        process = forked.start([*words, "--output_dir", folder], folder.with_suffix(".out"))
        process.join(draw.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was over already: the next moment is an earlier one
            seconds, late = 0.8 * seconds, late + 1
            continue
        killed += 1
        found = run([*words, "--resume", "auto"], folder)
        assert found.status == 0, found.out
        assert_same_folders(folder, tmp_path / "whole")
