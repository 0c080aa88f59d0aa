"""YAML that is no settings: aliases that multiply, tags without a value, paths of no system."""

import os

import pytest
import torch

import fambav
from fambav import cli
from fambav.config import ConfigError, load
from fambav.engine.checkpoint import CheckpointError
from tests import made
from tests.trust.forked import run_alone
from tests.trust.refusals import call, refused, the_line_of


def bomb(levels, *, start="x", wide=9):
    """Lists of lists in which every level names the one before `wide` times."""
    lines = [f"a0: &a0 [{', '.join([start] * wide)}]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * wide)}]")
    return lines


def inline(levels, *, wide=9):
    """The same as one value."""
    text = "x"
    for level in range(levels):
        text = f"&b{level} [{text}{f', *b{level - 1}' * (wide - 1) if level else ''}]"
    return text


SETTINGS = {
    "an alias bomb as a number": f"epochs: {inline(9)}",
    "an alias bomb as text": f"model: {inline(9)}",
    "an alias bomb as numbers": f"opt_betas: {inline(9)}",
    "an alias bomb as a setting that may be none": f"clip_grad: {inline(9)}",
    "an alias bomb in unknown settings": "\n".join(bomb(9)),
    "an alias bomb as base": f"base: {inline(9)}",
    "an alias bomb of mappings": f"epochs: {inline(9).replace('[x', '[{a: 1}')}",
    "an alias bomb as a key": f"? {inline(9)}\n: 1",
    "a merged alias bomb": "x: &x {epochs: 3}\n<<: [*x, *x]\nepochs: 4",
    "a list in itself": "epochs: &a [*a]",
    "a mapping in itself": "epochs: &a {a: *a}",
    "a long text": f"model: {'a' * 1_000_000}",
    "deep lists": f"epochs: {'[' * 3000}{']' * 3000}",
    "deep mappings": f"epochs: {'{a: ' * 3000}1{'}' * 3000}",
    "no whole number": 'epochs: !!int ""',
    "no number": 'lr: !!float ""',
    "a number that is none": "lr: !!float x",
    "a sign alone": "epochs: !!int -",
    "no truth": "eval: !!bool maybe",
    "no time": "model: !!timestamp foo",
    "an impossible day": "model: 2001-99-99",
    "no base 64": "model: !!binary '*'",
    "a set": "epochs: !!set {3}",
    "an ordered mapping": "epochs: !!omap [a: 1]",
    "no ordered mapping": "epochs: !!omap 3",
    "no pairs": "epochs: !!pairs 3",
    "an unknown tag": "epochs: !mine 3",
    "a tag on a key": '!!int "": 3',
    "a tag on the whole": '!!int ""',
    "two documents": "epochs: 3\n---\nepochs: 4",
    "a tab": "\tepochs: 3",
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_refused_at_once(tmp_path, case):
    (tmp_path / "a.yaml").write_text(SETTINGS[case] + "\n")
    words = ["--config", tmp_path / "a.yaml", "--model", "vim_micro"]
    found = run_alone([*words, "--output_dir", tmp_path / "run"], tmp_path / "out", timeout=10)
    the_line_of(found, "a.yaml")
    assert not (tmp_path / "run").exists()


PATHS = {
    "output_dir": "",
    "data_path": "data_set: CIFAR",
    "finetune": "",
    "resume": "",
    "teacher_path": "distillation_type: soft\nteacher_model: vim_micro",
    "base": "",
}


@pytest.mark.parametrize("path", ["a\\0b", "a\\uD800b"])
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_no_system_can_have_is_refused(tmp_path, name, path):
    (tmp_path / "a.yaml").write_text(f'model: vim_micro\n{PATHS[name]}\n{name}: "{path}"\n')
    words = ["--config", tmp_path / "a.yaml"]
    words += ["--output_dir", tmp_path / "run"] * (name != "output_dir")
    words += ["--data-set", "DIGITS"] * (name != "data_path")
    the_line_of(run_alone(words, tmp_path / "out", at(tmp_path), 10), name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "out"]


def at(folder):
    return lambda: os.chdir(folder)


GRIDS = {
    "an alias bomb as rows": f"base: a.yaml\nseeds: [0]\nrows: {inline(9)}",
    "an alias bomb as seeds": f"base: a.yaml\nseeds: {inline(9)}\nrows: []",
    "an alias bomb as a title": f"title: {inline(9)}\nbase: a.yaml\nseeds: [0]\nrows: []",
    "an alias bomb as a name": f"base: a.yaml\nseeds: [0]\nrows: [{{name: {inline(9)}}}]",
    "an alias bomb as a setting": (
        f"base: a.yaml\nseeds: [0]\nrows: [{{name: a, fusion_token: {inline(9)}}}]"
    ),
    "an alias bomb as a paper": (
        f"base: a.yaml\nseeds: [0]\nrows: [{{name: a, fusion_token: 3, paper: {inline(9)}}}]"
    ),
    "no whole number": 'base: a.yaml\nseeds: [!!int ""]\nrows: []',
    "no truth": "base: a.yaml\nseeds: [!!bool maybe]\nrows: []",
    "no time": "base: a.yaml\ntitle: !!timestamp foo\nseeds: [0]\nrows: []",
    "zeros in the base": 'base: "a\\0b"\nseeds: [0]\nrows: [{name: a, fusion_token: 3}]',
}


@pytest.mark.parametrize("case", GRIDS)
def test_a_grid_that_cannot_be_is_refused_at_once(tmp_path, case):
    (tmp_path / "a.yaml").write_text("model: vim_micro\n")
    (tmp_path / "grid.yaml").write_text(GRIDS[case] + "\n")
    words = ["table", "--grid", tmp_path / "grid.yaml", "--output_dir", tmp_path / "new"]
    found = run_alone(words, tmp_path / "out", timeout=10, program=cli.console)
    the_line_of(found, "grid.yaml")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["config.yaml", "a.yaml"])
def test_settings_that_are_no_plain_file_are_refused_at_once(tmp_path, name):
    """One that another process would have to write, or that never ends."""
    os.mkfifo(tmp_path / name)
    found = run_alone(["--config", tmp_path / name], tmp_path / "out", timeout=10)
    the_line_of(found, name, "file")


def test_a_device_is_no_file_of_settings():
    refused("--config", "/dev/null/a.yaml", names=["/dev/null/a.yaml"])
    refused("--config", "/", names=["'/'"])


def multiplied(levels):
    value = ["x"] * 9
    for _ in range(levels):
        value = [value] * 9
    return value


def cyclic(_):
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize("make", [multiplied, cyclic])
@pytest.mark.parametrize("name", ["config", "epochs", "class_names", "history", "mean", "schedule"])
def test_such_values_in_a_checkpoint_are_refused_at_once(tmp_path, name, make):
    def change(state):
        if name == "epochs":
            state["config"][name] = make(9)
        else:
            state[name] = make(9)

    path = made.run(tmp_path / "checkpoint.pth", change=change)

    def read(_):
        torch.set_num_threads(1)
        try:
            fambav.from_pretrained(path)
        except (CheckpointError, ConfigError) as error:
            print(f"error: {error}")
            return 2
        return 0

    found = run_alone([], tmp_path / "out", timeout=10, program=read)
    the_line_of(found, name)


@pytest.mark.timeout(10)
def test_values_of_python_are_shown_in_few_characters():
    value = multiplied(9)
    with pytest.raises(ConfigError, match=r"^[^\n]{1,400}$"):
        fambav.from_pretrained("nowhere", epochs=value)


def test_what_a_run_writes_is_read_again(tmp_path):
    (tmp_path / "a.yaml").write_text("model: vim_micro\nopt_betas: &a [0.9, 0.95]\n")
    config = load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "b.yaml").flat() == config.flat()
    assert call("plan", "--config", tmp_path / "a.yaml", program=cli.console).status == 0
