"""The ends of the learning rate and the warm-up stay within the run, or it is said."""

import pytest
import torch

from fambav.config import Config, ConfigError, load, parse
from fambav.engine.distributed import Processes
from fambav.training.step import learning_rate
from tests.made import go

RUN = ["--model", "vim_micro"]
BEYOND = {
    "--min-lr 2e-3 --lr 1e-3": "--min-lr is 0.002, expected at most 0.001, as --lr is",
    "--min-lr 1e-3": "--min-lr is 0.001, expected at most 0.0005, as --lr is",
    "--warmup-lr 2e-3 --lr 1e-3": "--warmup-lr is 0.002, expected at most 0.001, as --lr is",
    "--warmup-epochs 6 --epochs 5": "--warmup-epochs is 6, expected at most 5, as --epochs is",
    "--warmup-epochs 301": "--warmup-epochs is 301, expected at most 300, as --epochs is",
}


@pytest.mark.parametrize("words", BEYOND)
def test_what_is_typed_beyond_its_limit_is_refused(words):
    with pytest.raises(ConfigError) as refused:
        parse([*RUN, *words.split()])
    assert str(refused.value).startswith(BEYOND[words])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("words", BEYOND)
def test_what_a_file_sets_beyond_its_limit_is_refused(tmp_path, words):
    pairs = words.replace("--", "").replace("-lr", "_lr").replace("-epochs", "_epochs").split()
    values = dict(zip(pairs[::2], map(float if "lr" in words else int, pairs[1::2]), strict=True))
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    with pytest.raises(ConfigError, match="expected at most"):
        parse(["--config", str(path)])
    with pytest.raises(ConfigError, match="expected at most"):
        Config.from_flat(values)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--epochs 1", "warmup_epochs", 1),
        ("--lr 1e-6", "min_lr", 1e-6),
        ("--lr 1e-7", "warmup_lr", 1e-7),
    ],
)
def test_a_default_gives_way_and_a_line_says_so(tmp_path, words, name, value):
    run = parse([*RUN, *words.split()])
    assert run.optim.warmup_epochs == 5, "the setting stays, what is made of it does not"
    lines = [line for line in run.notice.splitlines() if line.startswith(f"warning: {name} is ")]
    assert len(lines) == 1
    assert "by default, more than" in lines[0]
    path = tmp_path / "run.yaml"
    path.write_text(run.to_yaml())
    assert load(path) == run
    assert f"it is {value!r} in this run" in lines[0]
    rate = learning_rate(run, Processes(0, 1, torch.device("cpu")), per_epoch=10)
    made = {"warmup_epochs": rate(9) / run.optim.lr, "min_lr": rate(3000), "warmup_lr": rate(0)}
    scale = 64 / 512
    wanted = {"warmup_epochs": 0.9 * scale, "min_lr": 1e-6, "warmup_lr": 1e-7}
    assert made[name] == pytest.approx(wanted[name], rel=0.05)


def test_a_file_gives_way_to_what_is_typed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("warmup_epochs: 20\n")
    run = parse(["--config", str(path), "--epochs", "3"])
    assert run.optim.warmup_epochs == 3
    assert run.notice == "warning: warmup_epochs is 20, more than --epochs; it is 3 in this run"
    assert parse(["--config", str(path)]).optim.warmup_epochs == 20


def test_a_recipe_may_have_both_ends_above_the_middle_if_it_says_so():
    words = "--lr 5e-6 --min-lr 1e-5 --warmup-lr 1e-5"
    with pytest.raises(ConfigError, match="--rising-lr allows it"):
        parse([*RUN, *words.split()])
    run = parse([*RUN, *words.split(), "--rising-lr"])
    assert (run.optim.lr, run.optim.min_lr, run.optim.warmup_lr) == (5e-6, 1e-5, 1e-5)


def test_a_short_run_by_defaults_trains_with_one_warning(tmp_path):
    words = """--model vim_micro --input-size 16 --data-set FAKE --num-classes 5 --num_workers 0
        --batch-size 640 --epochs 1 --aa none --threads 1"""
    found = go(*words.split(), "--output_dir", tmp_path / "run")
    assert found.status == 0, found.err
    assert found.err == (
        "warning: warmup_epochs is 5 by default, more than --epochs; it is 1 in this run\n"
    )
    again = go("--config", tmp_path / "run" / "config.yaml", "--output_dir", tmp_path / "again")
    assert again.status == 0, again.err
    assert again.err.startswith("warning: warmup_epochs is 5 by default") and again.err[-1] == "\n"


def test_a_scaled_rate_below_its_ends_is_told(tmp_path):
    words = """--model vim_micro --input-size 16 --data-set FAKE --num-classes 5 --num_workers 0
        --batch-size 320 --epochs 1 --warmup-epochs 0 --aa none --threads 1 --lr 1e-5"""
    found = go(*words.split(), "--output_dir", tmp_path / "run")
    line = "warning: lr is 6.25e-06 at 320 images per update, less than min_lr 1e-05, which are not"
    assert found.status == 0, found.err
    assert line in found.out
    unscaled = go(*words.split(), "--unscale-lr", "--output_dir", tmp_path / "unscaled")
    assert "warning: " not in unscaled.out
