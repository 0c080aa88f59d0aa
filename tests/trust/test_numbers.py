"""Numbers beyond what a machine counts to: refused in a line, whoever reads them, and at once."""

import pytest
import timm
import torch

import fambav
from fambav import cli
from fambav.config import OPTIONS
from fambav.engine.checkpoint import CheckpointError
from tests import made
from tests.trust.refusals import call, refused, the_line

pytestmark = pytest.mark.timeout(60)  # some of these numbers were once taken at their word

LONG, LARGE, WIDE = "1" + "0" * 400, "1" + "0" * 300, "1" + "0" * 30
NUMERIC = [name for name, option in OPTIONS.items() if option.kind in (int, float, tuple)]


@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000, "-" + LONG], ids=["400", "5000", "-400"])
def test_a_flag_of_hundreds_of_digits_is_refused(number):
    for name in NUMERIC:
        words = ["--model", "vim_micro", f"--{OPTIONS[name].flag}", number]
        words += [number] if OPTIONS[name].length == 2 else []
        assert len(refused(*words, names=[OPTIONS[name].flag])) < 300


@pytest.mark.parametrize(
    "text", [LONG, "-" + LONG, "1" * 5000, ".inf", ".nan"], ids=lambda t: t[:5]
)
def test_a_file_of_settings_refuses_such_a_number(tmp_path, text):
    for name in NUMERIC:
        value = f"[{text}, {text}]" if OPTIONS[name].kind is tuple else text
        (tmp_path / "a.yaml").write_text(f"model: vim_micro\n{name}: {value}\n")
        refused("--config", tmp_path / "a.yaml", names=["a.yaml"])


BIG = {
    "--epochs": LARGE,
    "--num_workers": "100000",
    "--threads": "100000",
    "--input-size": "1000000000",
    "--num-classes": WIDE,
    "--stride": WIDE,
    "--device": f"cuda:{LONG}",
    "--fusion-plan": f"{LONG}:3",
    "--recount": "1000000000",
    "--aa": "rand-m9-n999999999",
}


@pytest.mark.parametrize("flag", BIG)
def test_a_number_that_no_machine_can_have_is_refused(tmp_path, flag):
    words = ["--model", "vim_micro", flag, BIG[flag], "--output_dir", tmp_path / "run"]
    refused(*words, names=[flag.removeprefix("--").replace("-", "_").split("_")[0]])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("high", [2**31 - 1, 2**31])
def test_the_largest_count_is_the_last_that_is_taken(high):
    found = call("plan", "--model", "vim_micro", "--save-every", high, program=cli.console)
    assert found.status == (0 if high < 2**31 else 2)
    assert ("expected at most 2147483647\n" in found.err) == (high == 2**31)


SCHEDULES = (f"r:{LONG}", f"ramp:{LONG},-1", f"r:3@1-{LONG}", f"upper:{LONG}:3")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda text: text[:8])
def test_a_schedule_with_such_a_number_is_refused(schedule):
    words = ["plan", "--model", "vim_micro", "--reduction", "ordered"]
    words += ["--reduction-schedule", schedule]
    refused(*words, names=["reduction_schedule", "at most 9 digits"], program=cli.console)


COMMANDS = {
    "table --seeds": ["table", "digits-table1", "--seeds"],
    "table --jobs": ["table", "digits-table1", "--jobs"],
    "bench --rounds": ["bench", "scan", "--length", "4", "--rounds"],
    "bench --workers": ["bench", "data", "--workers"],
    "search-plan --steps": ["search-plan", "run", "--budget", "token-layers:0.7", "--steps"],
    "search-plan --seed": ["search-plan", "run", "--budget", "token-layers:0.7", "--seed"],
    "export --images": ["export", "run", "--format", "hf", "--noise", "--images"],
    "show --index": ["show", "run", "--what", "layers", "--index"],
    "predict --topk": ["predict", "run", "a.png", "--topk"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_a_number_of_400_digits(command):
    name = "--" + command.split("--")[1]
    line = refused(*COMMANDS[command], LONG, names=[f"{name} is 1000"], program=cli.console)
    assert len(line) < 300


def test_a_command_refuses_what_is_not_finite():
    words = ["export", "run", "--format", "hf", "--tolerance", "inf"]
    refused(*words, names=["--tolerance is inf, expected a finite number"], program=cli.console)
    refused("tune", "run", "--margin", LONG, names=["--margin is inf"], program=cli.console)


def test_more_guesses_than_classes_are_all_of_them(tmp_path):
    from PIL import Image

    path = made.run(tmp_path / "checkpoint.pth")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    found = call("predict", path, tmp_path / "a.png", "--topk", 10**9, program=cli.console)
    assert found.status == 0
    assert len(found.out.splitlines()) == 11


GRID = """base: {base}
seeds: [0]
rows:
  - {{name: upper, fusion_strategy: upper, fusion_layer: 4, fusion_token: 3}}
"""
GRIDS = {
    "a seed": ("seeds: [0]", f"seeds: [{LONG}]"),
    "a seed of 5000 digits": ("seeds: [0]", f"seeds: [{'1' * 5000}]"),
    "a token": ("fusion_token: 3", f"fusion_token: {LONG}"),
    "a figure of a paper": ("name: upper", f"name: upper, paper: {{acc1: {LONG}}}"),
    "a time of a paper": ("name: upper", f"name: upper, paper: {{time: '{LONG}:00:00'}}"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_a_grid_refuses_such_a_number(tmp_path, case):
    (tmp_path / "base.yaml").write_text("model: vim_micro\n")
    old, new = GRIDS[case]
    text = GRID.format(base="base.yaml")
    assert old in text
    (tmp_path / "grid.yaml").write_text(text.replace(old, new))
    words = ["table", "--grid", tmp_path / "grid.yaml", "--output_dir", tmp_path / "new"]
    the_line(call(*words, program=cli.console), "grid.yaml")
    assert not (tmp_path / "new").exists()


def put(name, value):
    def change(state):
        state[name] = value

    return change


ENTRIES = dict(epoch=1, seconds=1, mean=3, grid=2, losses=1, best_acc1=1)  # how many numbers


@pytest.mark.parametrize("name", ENTRIES)
def test_a_checkpoint_with_a_number_of_400_digits_is_refused(tmp_path, name):
    many = name in ("mean", "grid", "losses")
    value = [int(LONG)] * ENTRIES[name] if many else int(LONG)
    path = made.run(tmp_path / "checkpoint.pth", change=put(name, value))
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{name}[^\n]*$"):
        fambav.from_pretrained(path)


def test_a_checkpoint_with_such_a_setting_is_refused(tmp_path):
    def change(state):
        state["config"]["lr"] = int(LONG)

    path = made.run(tmp_path / "checkpoint.pth", change=change)
    with pytest.raises(ValueError, match=r"^[^\n]*lr is 1000[^\n]*, expected a finite number$"):
        fambav.from_pretrained(path)


def test_an_optimizer_with_such_a_number_is_refused(tmp_path):
    group = dict(params=[0], lr=0.1, weight_decay=int(LONG))
    state = dict(state={}, param_groups=[group])
    path = made.run(tmp_path / "checkpoint.pth", change=put("optimizer", state))
    with pytest.raises(CheckpointError, match=r"optimizer is .*, expected the state"):
        fambav.from_pretrained(path)


ARGUMENTS = {
    "img_size": lambda n: timm.create_model("vim_micro", img_size=(n, n)),
    "depth": lambda n: timm.create_model("plainmamba_micro", depth=n),
    "drop_path_rate": lambda n: timm.create_model("vim_micro", drop_path_rate=n),
    "schedule": lambda n: fambav.reduce(timm.create_model("vim_micro"), "ordered", n),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_400_digits_is_refused(name):
    sentence = rf"^[^\n]*{name}[^\n]*, expected [^\n]*$"
    with torch.device("meta"), pytest.raises((ValueError, TypeError), match=sentence):
        ARGUMENTS[name](int(LONG))
