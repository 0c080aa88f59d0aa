"""Damaged and malicious files: all refused in one line, and `auto` takes the last good one."""

import argparse
import functools
import os
import pickle
import random
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from tests.damage import flipped, truncated, zeroed
from tests.data.made import made_cifar
from tests.identical import assert_identical, assert_same_folders
from tests.trust.forked import run
from tests.trust.test_kills import at_call

HARM = {"truncations": (truncated, 200), "bit flips": (flipped, 200), "zeroed pages": (zeroed, 100)}


@pytest.mark.parametrize("name", ["checkpoint.pth", "model.safetensors"])
@pytest.mark.parametrize("harm", HARM)
def test_damaged_checkpoints_are_all_refused_in_one_line(whole, tmp_path, name, harm):
    function, count = HARM[harm]
    raw, draw, path = (whole / name).read_bytes(), random.Random(3), tmp_path / name
    refused = 0
    for _ in range(count):
        path.write_bytes(function(raw, draw))
        with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
            checkpoint.load(path)
        refused += 1
    assert refused == count


@pytest.mark.parametrize("harm", HARM)
def test_auto_takes_the_checkpoint_before_a_damaged_one_and_says_so(whole, recipe, tmp_path, harm):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "checkpoint.pth"
    broken = HARM[harm][0](path.read_bytes(), random.Random(1))
    path.unlink()  # the best one may be the same file
    path.write_bytes(broken)
    found = run([*recipe, "--resume", "auto"], folder)
    assert found.status == 0, found.out
    assert "checkpoint.pth is " in found.out
    assert "damaged" in found.out
    assert "; trying the one before" in found.out
    assert f"going on from {folder / 'previous_checkpoint.pth'}" in found.out
    assert_identical(folder, whole)


def test_a_run_that_dies_again_before_it_saves_still_has_a_good_checkpoint(whole, recipe, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "best_checkpoint.pth").unlink()
    path = folder / "checkpoint.pth"
    broken = truncated(path.read_bytes(), random.Random(1))
    path.unlink()
    path.write_bytes(broken)
    words = [*recipe, "--resume", "auto"]
    died = run(words, folder, at_call(checkpoint, "save", 1))
    assert died.status == -9, died.out
    assert checkpoint.load(folder / "previous_checkpoint.pth")["epoch"] == 1
    found = run(words, folder)
    assert found.status == 0, found.out
    assert checkpoint.load(path)["epoch"] == 2


@pytest.mark.parametrize("name", ["log.txt", "metrics.csv", "model.safetensors"])
def test_a_finished_run_whose_files_were_damaged_is_repaired(whole, recipe, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path, words = folder / name, [*recipe, "--resume", "auto"]
    found = run(words, folder)
    assert found.status == 0, found.out
    assert "differs" not in found.out
    assert_same_folders(folder, whole)
    before = path.read_bytes()
    at = before.index(b"1", len(before) // 2)
    path.write_bytes(before[:at] + b"7" + before[at + 1 :])
    found = run(words, folder)
    assert found.status == 0, found.out
    said = f"{name} differs from the checkpoint's history; it is written anew from that"
    assert found.out.count(said) == (name != "model.safetensors")
    assert name == "model.safetensors" or path.read_bytes() == before
    assert_same_folders(folder, whole)


def test_without_a_good_one_auto_is_refused_and_nothing_changes(whole, recipe, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in folder.glob("*checkpoint.pth"):
        path.unlink()
        path.write_bytes(b"PK")
    before = {path.name: path.read_bytes() for path in folder.glob("*.txt")}
    found = run([*recipe, "--resume", "auto"], folder)
    assert found.status == 2
    assert found.out.count("error: ") == 1
    assert {path.name: path.read_bytes() for path in folder.glob("*.txt")} == before


class Payload:
    """Reduces to whatever it is told."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def payloads(target):
    """Ten ways to have code run while a file is read."""
    make = f"__import__('os').mkdir({str(target)!r})"
    word = str(target)
    return {
        "os.mkdir": Payload(os.mkdir, (word,)),
        "eval": Payload(eval, (make,)),
        "exec": Payload(exec, (make,)),
        "subprocess": Payload(subprocess.call, (["mkdir", word],)),
        "os.system": Payload(os.system, (f"mkdir {word}",)),
        "getattr": Payload(getattr, (Payload(os.mkdir, (word,)), "real")),
        "set state": Payload(SimpleNamespace, (), {"x": Payload(os.mkdir, (word,))}),
        "list items": Payload(list, (), None, iter([Payload(os.mkdir, (word,))])),
        "a partial call": Payload(functools.partial, (eval, make)),
        "in the arguments": argparse.Namespace(opt=[Payload(os.mkdir, (word,))]),
    }


@pytest.mark.parametrize("name", payloads("x"))
def test_malicious_checkpoints_execute_nothing(recipe, tmp_path, name):
    target, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"model": {}, "args": payloads(target)[name]}, path)
    for words in (["--resume", path], ["--finetune", path], ["--eval", "--resume", path]):
        found = run([*recipe, *words], tmp_path / "run")
        assert found.status == 2, found.out
        assert found.out.count("error: ") == 1
        assert not target.exists()


@pytest.mark.parametrize("name", payloads("x"))
def test_malicious_batches_of_cifar_execute_nothing(recipe, tmp_path, name):
    target = tmp_path / "ran"
    folder = made_cifar(tmp_path, train=40, test=37)
    raw = pickle.dumps({b"data": payloads(target)[name], b"fine_labels": [0]}, protocol=2)
    (folder / "train").write_bytes(raw)
    found = run([*recipe, "--data-path", tmp_path], tmp_path / "run")
    assert found.status == 2, found.out
    assert found.out.count("error: ") == 1
    assert not target.exists()
