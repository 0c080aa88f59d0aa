"""Samples that cannot be read: named, the state saved, and a few left out if that is wanted."""

import os
import signal
import time

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from fambav.data import loaders
from fambav.data.types import ArraySet
from fambav.engine import checkpoint
from fambav.training import batches
from tests.data.made import made_folder
from tests.identical import assert_identical, log
from tests.trust.forked import run, run_two

FOLDER = """--model vim_micro --input-size 16 --data-set FOLDER --data-stats imagenet
    --num_workers 0 --batch-size 8 --epochs 2 --warmup-epochs 0 --no-repeated-aug --threads 1
    --device cpu"""


def broken_at(call, what):
    """Let the reading of the `call`-th sample of a process go wrong."""

    def prepare():
        real, calls = ArraySet.__getitem__, []

        def spoiled(self, place):
            calls.append(1)
            if len(calls) == call:
                what()
            return real(self, place)

        ArraySet.__getitem__ = spoiled

    return prepare


def raises():
    raise RuntimeError("the disk is on fire")


def vanishes():
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    time.sleep(600)  # so that nobody can wait for its end


def impatient(then):
    def prepare():
        loaders.PATIENCE = 2
        then()

    return prepare


FAILURES = {
    "raises": (broken_at(10, raises), "the disk is on fire"),
    "is killed": (broken_at(10, vanishes), "a loader process ended or hangs before update"),
    "hangs": (impatient(broken_at(10, hangs)), "a loader process ended or hangs before update"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_loader_process_that_fails_is_told_in_a_line_and_the_state_is_saved(
    whole, recipe, tmp_path, failure
):
    folder, (prepare, expected) = tmp_path / "run", FAILURES[failure]
    found = run([*recipe, "--num_workers", "1"], folder, prepare)
    assert found.status == 5, found.out
    errors = [line for line in found.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "sample" in errors[0]
    assert "Traceback" not in found.out
    assert checkpoint.load(folder / "checkpoint.pth")["updates"] is not None
    assert run([*recipe, "--resume", "auto"], folder).status == 0
    assert_identical(folder, whole)


def test_of_two_processes_both_end_when_one_cannot_read(recipe, tmp_path):
    def prepare(rank):
        if rank == 1:
            broken_at(10, raises)()

    found = run_two([*recipe, "--batch-size", "4"], tmp_path / "run", prepare)
    assert found.status == [5, 5], found.out + found.other
    assert found.out.count("error: ") == 1
    assert "the disk is on fire" in found.out
    assert "error: " not in found.other


@pytest.fixture
def images(tmp_path):
    """A folder of 240 images to train on and 120 held out, one damaged and one of floats."""
    made_folder(tmp_path / "images", train=120, val=60, size=(20, 20))
    bad = [sorted((tmp_path / "images" / part).rglob("*.*"))[7] for part in ("train", "val")]
    bad[0].write_bytes(b"no image")
    Image.new("F", (20, 20), 0.5).save(bad[1], "TIFF")
    return tmp_path / "images", bad


def test_a_damaged_image_is_named(images, tmp_path):
    folder, bad = images
    found = run([*FOLDER.split(), "--data-path", folder], tmp_path / "run")
    assert found.status == 5, found.out
    line = next(line for line in found.out.splitlines() if line.startswith("error: "))
    assert str(bad[0]) in line
    assert "expected an image" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_left_out_and_counted_if_that_is_wanted(images, tmp_path, workers):
    folder, _ = images
    words = [*FOLDER.split(), "--data-path", folder, "--on-bad-image", "skip"]
    found = run([*words, "--num_workers", workers], tmp_path / "run")
    assert found.status == 0, found.out
    assert "2 unreadable images were left out so far" in found.out
    assert len(log(tmp_path / "run")) == 2
    evaluated = run([*words, "--eval", "--resume", tmp_path / "run/checkpoint.pth"], tmp_path / "e")
    assert "on the 119 test images" in evaluated.out


def test_more_than_one_in_a_hundred_is_too_many(images, tmp_path):
    folder, _ = images
    for path in sorted((folder / "train").rglob("*.*"))[20:23]:
        path.write_bytes(b"")
    words = [*FOLDER.split(), "--data-path", folder, "--on-bad-image", "skip"]
    found = run(words, tmp_path / "run")
    assert found.status == 5, found.out
    assert "3 of 240 samples cannot be read, expected at most 1%" in found.out


def ahead(batches_each):
    """Let loader processes read so many batches in advance."""

    def prepare():
        given = {"prefetch_factor": batches_each}
        loaders.DataLoader = lambda *words, **own: DataLoader(*words, **own, **given)

    return prepare


@pytest.mark.parametrize(("workers", "prefetched"), [(1, 2), (2, 1), (2, 7), (4, 2)])
def test_any_number_of_loader_processes_and_of_batches_in_advance_gives_the_same_bits(
    whole, recipe, tmp_path, workers, prefetched
):
    assert batches._EVAL_BATCH == 1.5  # the last batch of evaluation is not full
    folder = tmp_path / "run"
    assert run([*recipe, "--num_workers", workers], folder, ahead(prefetched)).status == 0
    assert_identical(folder, whole)
