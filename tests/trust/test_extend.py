"""Runs that go on under other settings, and from folders."""

import json
import shutil

import pytest

from fambav import cli
from fambav.engine import checkpoint
from fambav.experiments import changed_settings, read_run
from tests.identical import log
from tests.trust.forked import run
from tests.trust.refusals import call, refused

LONGER = ["--resume", "auto", "--epochs", "5", "--lr", "5e-4", "--weight-decay", "0.2"]


@pytest.fixture(scope="module")
def longer(recipe, whole, tmp_path_factory):
    """A run of three epochs, extended to five."""
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("extended") / "run")
    found = run([*recipe, *LONGER, "--extend"], folder)
    assert found.status == 0, found.out
    return folder


def test_other_settings_are_refused_with_a_way_on(recipe, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    words = [*recipe, "--output_dir", folder, "--resume", "auto"]
    line = refused(*words, "--lr", "5e-4", names=["lr 0.001 -> 0.0005", "--extend"])
    assert "epochs" not in line
    words.append("--extend")
    line = refused(*words, "--opt", "sgd", "--lr", "1", names=["opt adamw -> sgd"])
    assert "lr" not in line
    refused(*words, "--fusion-token", "2", names=["fusion_token 3 -> 2"])
    refused(*words, "--epochs", "2", names=["epochs is 2, expected at least the 3"])
    last = folder / "checkpoint.pth"
    state = checkpoint.load(last)
    assert "changes" not in state
    checkpoint.save(last, {**state, "epoch": 1, "updates": 5, "losses": [4.0]})
    refused(*words, "--batch-size", "4", names=["within an epoch", "images per update 16 -> 8"])


def test_an_extended_run_follows_the_schedule_of_now(recipe, longer, whole, tmp_path):
    fresh = tmp_path / "fresh"
    assert run([*recipe, *LONGER[2:]], fresh).status == 0
    ours, theirs = log(longer), log(fresh)
    assert [epoch["train_lr"] for epoch in ours[3:]] == [epoch["train_lr"] for epoch in theirs[3:]]
    assert log(whole)[:3] == ours[:3]
    assert ours[3]["train_loss"] != theirs[3]["train_loss"]
    groups = checkpoint.load(longer / "checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]


def test_what_changed_is_recorded_and_sets_the_run_apart(recipe, longer, whole, tmp_path):
    settings = {"epochs": [3, 5], "weight_decay": [0.05, 0.2], "lr": [1e-3, 5e-4]}
    state = checkpoint.load(longer / "checkpoint.pth")
    (change,) = state["changes"]
    assert (change["epoch"], change["settings"]) == (3, settings)
    assert [epoch.get("changed") for epoch in log(longer)] == [None] * 3 + [settings, None]
    assert json.loads((longer / "env.json").read_text())["changes"] == [change]
    rows = (longer / "metrics.csv").read_text().splitlines()
    assert len({row.count(",") for row in rows}) == 1
    text = changed_settings(3, settings)
    assert read_run(longer).recipe["changed"] == text
    fresh = tmp_path / "fresh"
    assert run([*recipe, *LONGER[2:]], fresh).status == 0
    refused("table", fresh, longer, names=["changed (none,"], program=cli.console)
    folder = tmp_path / "out"
    shutil.copy(longer / "checkpoint.pth", tmp_path)
    words = ("export", tmp_path / "checkpoint.pth", "--format", "hf", "--output_dir", folder)
    assert call(*words, "--noise", program=cli.console).status == 0
    assert text in (folder / "README.md").read_text()


def test_a_second_change_is_listed_too_and_may_be_of_the_batch(recipe, longer, tmp_path):
    folder = shutil.copytree(longer, tmp_path / "run")
    words = [*recipe, *LONGER, "--epochs", "6", "--batch-size", "4", "--mixup", "0"]
    assert run([*words, "--extend"], folder).status == 0
    state = checkpoint.load(folder / "checkpoint.pth")
    assert [change["epoch"] for change in state["changes"]] == [3, 5]
    settings = {"mixup": [0.8, 0.0], "epochs": [5, 6], "images_per_update": [16, 8]}
    assert state["changes"][1]["settings"] == settings
    assert (state["epoch"], state["updates"]) == (5, 6 * 5)
    assert run(words, folder).status == 0, "the settings are those of the run by now"
    before = state["changes"]
    assert checkpoint.load(folder / "checkpoint.pth")["changes"] == before


def test_a_folder_means_its_last_good_checkpoint(recipe, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "checkpoint.pth").write_bytes(b"damaged")
    found = call(*recipe, "--resume", folder)
    assert (found.status, found.err) == (0, "")
    assert "trying the one before" in found.out
    assert f"going on from {folder / 'previous_checkpoint.pth'}, after" in found.out
    assert f"run folder: {folder}\n" in found.out
    refused(*recipe, "--resume", tmp_path, names=[tmp_path, "checkpoint.pth"])
