"""Runs at the recipe's learning rate stay finite, and say how large activations become."""

import math

import pytest

from fambav.engine import checkpoint
from tests.identical import log
from tests.trust.forked import run

SHORT = "--epochs 1 --warmup-epochs 0"
SMALL = "--input-size 16 --fusion-token 3"


@pytest.mark.parametrize("precision", ["--no_amp", "--if_amp"])
def test_a_run_on_digits_stays_finite_and_records_its_activations(tmp_path, precision):
    folder = tmp_path / "run"
    recipe = ["--config", "configs/digits/vim_micro_upper.yaml", "--device", "cpu", precision]
    found = run([*recipe, *SMALL.split(), *SHORT.split(), "--log-activations"], folder)
    assert found.status == 0, found.out
    (line,) = log(folder)
    assert line["skipped_updates"] == 0
    assert all(map(math.isfinite, (line["train_loss"], line["test_loss"])))
    assert len(line["activation_max"]) == 6
    assert all(0 < value < 1e4 for value in line["activation_max"])
    state = checkpoint.load(folder / "checkpoint.pth")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert state["updates"] == 89


def test_what_a_run_records_of_activations_survives_an_interruption(recipe, tmp_path):
    from tests.trust.test_disk import stop_after_two

    words, folders = [*recipe, "--log-activations"], [tmp_path / "one", tmp_path / "two"]
    assert run(words, folders[0]).status == 0
    assert run([*words, "--epochs", "3"], folders[1], stop_after_two).status == 143
    assert run([*words, "--resume", "auto"], folders[1]).status == 0
    one, two = ([line["activation_max"] for line in log(folder)] for folder in folders)
    assert one == two
