"""YAML that is no settings: aliases that multiply, tags without a value, paths of no system."""

import os

import pytest

import fambav
from fambav import cli
from fambav.config import ConfigError, load
from fambav.engine.checkpoint import CheckpointError
from tests import made
from tests.trust.forked import run_alone
from tests.trust.refusals import call, refused, the_line_of

pytestmark = pytest.mark.timeout(60)  # what multiplies once took hours


def inline(levels, *, wide=9):
    """Lists of lists in which every level names the one before `wide` times."""
    text = "x"
    for level in range(levels):
        text = f"&b{level} [{text}{f', *b{level - 1}' * (wide - 1) if level else ''}]"
    return text


def merged(levels):
    """Mappings of which each takes in the one before nine times."""
    lines = ["m0: &m0 {lr: 1.0}"]
    for level in range(1, levels):
        lines.append(f"m{level}: &m{level}\n  <<: [{', '.join([f'*m{level - 1}'] * 9)}]")
    return "\n".join(lines)


SETTINGS = {
    "an alias bomb as a number": f"epochs: {inline(9)}",
    "an alias bomb as text": f"model: {inline(9)}",
    "an alias bomb as numbers": f"opt_betas: {inline(9)}",
    "an alias bomb as a setting that may be none": f"clip_grad: {inline(9)}",
    "an alias bomb as base": f"base: {inline(9)}",
    "an alias bomb of mappings": f"epochs: {inline(9).replace('[x', '[{a: 1}')}",
    "an alias bomb as a key": f"? {inline(9)}\n: 1",
    "a merged alias bomb": merged(12),
    "a list in itself": "epochs: &a [*a]",
    "a long text": f"model: {'a' * 1_000_000}",
    "deep mappings": f"epochs: {'{a: ' * 3000}1{'}' * 3000}",
    "no whole number": 'epochs: !!int ""',
    "no number": 'lr: !!float ""',
    "no truth": "eval: !!bool maybe",
    "no time": "model: !!timestamp foo",
    "a tag on the whole": '!!int ""',
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_refused_at_once(tmp_path, case):
    (tmp_path / "a.yaml").write_text(SETTINGS[case] + "\n")
    words = ["--config", tmp_path / "a.yaml", "--model", "vim_micro"]
    refused(*words, "--output_dir", tmp_path / "run", names=["a.yaml"])
    assert not (tmp_path / "run").exists()


def test_mappings_may_take_in_others(tmp_path):
    """Of two that give a setting the first counts, and what is written beside them before both."""
    grid = "base: a.yaml\nseeds: [0]\nrows:\n  - &a {name: a, fusion_token: 3, lr: 1.0}\n"
    (tmp_path / "grid.yaml").write_text(grid + "  - {<<: [*a, *a], name: b, lr: 2.0}\n")
    from fambav.config import read_yaml

    row = read_yaml(tmp_path / "grid.yaml")["rows"][1]
    assert row == {"name": "b", "fusion_token": 3, "lr": 2.0}


PATHS = {
    "output_dir": "",
    "data_path": "data_set: CIFAR",
    "finetune": "",
    "resume": "",
    "teacher_path": "distillation_type: soft\nteacher_model: vim_micro",
    "base": "",
}


@pytest.mark.parametrize(
    ("name", "path"), [*((name, "a\\0b") for name in PATHS), ("output_dir", "a\\uD800b")]
)
def test_a_path_that_no_system_can_have_is_refused(tmp_path, name, path):
    (tmp_path / "a.yaml").write_text(f'model: vim_micro\n{PATHS[name]}\n{name}: "{path}"\n')
    words = ["--config", tmp_path / "a.yaml"]
    words += ["--output_dir", tmp_path / "run"] * (name != "output_dir")
    words += ["--data-set", "DIGITS"] * (name != "data_path")
    refused(*words, names=[name])
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_a_path_of_other_bytes_than_utf_8_is_one(tmp_path):
    config = load(write(tmp_path / "a.yaml", f'output_dir: "{tmp_path}/a\\uDCFFb"\n'))
    assert os.fsencode(config.run.output_dir).endswith(b"a\xffb")


def write(path, text):
    path.write_text(text)
    return path


GRIDS = {
    "an alias bomb as seeds": f"base: a.yaml\nseeds: {inline(9)}\nrows: []",
    "an alias bomb as a name": f"base: a.yaml\nseeds: [0]\nrows: [{{name: {inline(9)}}}]",
    "an alias bomb as a setting": (
        f"base: a.yaml\nseeds: [0]\nrows: [{{name: a, fusion_token: {inline(9)}}}]"
    ),
    "an alias bomb as a paper": (
        f"base: a.yaml\nseeds: [0]\nrows: [{{name: a, fusion_token: 3, paper: {inline(9)}}}]"
    ),
    "no whole number": 'base: a.yaml\nseeds: [!!int ""]\nrows: []',
    "zeros in the base": 'base: "a\\0b"\nseeds: [0]\nrows: [{name: a, fusion_token: 3}]',
    "zeros in a row": 'base: a.yaml\nseeds: [0]\nrows: [{name: a, config: "a\\0b"}]',
}


@pytest.mark.parametrize("case", GRIDS)
def test_a_grid_that_cannot_be_is_refused_at_once(tmp_path, case):
    (tmp_path / "a.yaml").write_text("model: vim_micro\n")
    (tmp_path / "grid.yaml").write_text(GRIDS[case] + "\n")
    words = ["table", "--grid", tmp_path / "grid.yaml", "--output_dir", tmp_path / "new"]
    refused(*words, names=["grid.yaml"], program=cli.console)
    assert not (tmp_path / "new").exists()


def test_settings_that_another_process_has_to_write_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    found = run_alone(["--config", tmp_path / "a.yaml"], tmp_path / "out", timeout=30)
    the_line_of(found, "a.yaml", "expected a plain file")
    refused("--config", "/dev/zero", names=["'/dev/zero', expected a plain file"])


def test_settings_may_come_from_a_command_of_the_shell():
    """As in `--config <(command)`."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        file.write("epochs: 7\n")
    try:
        assert load(f"/dev/fd/{reading}").optim.epochs == 7
    finally:
        os.close(reading)


def test_a_device_is_no_file_of_settings():
    refused("--config", "/dev/null/a.yaml", names=["/dev/null/a.yaml"])
    refused("--config", "/", names=["'/'"])


def multiplied(levels=9):
    value = ["x"] * 9
    for _ in range(levels):
        value = [value] * 9
    return value


def cyclic():
    value = []
    value.append(value)
    return value


CHECKPOINTS = [
    *(("config", multiplied), ("epochs", multiplied), ("epochs", cyclic), ("mean", cyclic)),
    *(("class_names", multiplied), ("history", multiplied)),
]


@pytest.mark.parametrize(("name", "make"), CHECKPOINTS)
def test_such_values_in_a_checkpoint_are_refused_at_once(tmp_path, name, make):
    def change(state):
        (state["config"] if name == "epochs" else state)[name] = make()

    path = made.run(tmp_path / "checkpoint.pth", change=change)
    with pytest.raises((CheckpointError, ConfigError), match=rf"^[^\n]*{name} is[^\n]{{1,400}}$"):
        fambav.from_pretrained(path)


def test_values_of_python_are_shown_in_few_characters():
    with pytest.raises(ConfigError, match=r"^[^\n]{1,400}$"):
        fambav.from_pretrained("nowhere", epochs=multiplied())


def test_what_a_run_writes_is_read_again(tmp_path):
    (tmp_path / "a.yaml").write_text("model: vim_micro\nopt_betas: &a [0.9, 0.95]\n")
    config = load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "b.yaml").flat() == config.flat()
    assert call("plan", "--config", tmp_path / "a.yaml", program=cli.console).status == 0
