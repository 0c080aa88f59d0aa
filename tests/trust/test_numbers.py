"""Numbers beyond what a machine counts to: refused in a line, whoever reads them, and at once."""

import resource

import pytest
import timm
import torch

import fambav
from fambav import cli
from fambav.config import OPTIONS
from fambav.engine.checkpoint import CheckpointError
from tests import made
from tests.trust.forked import run, run_alone
from tests.trust.refusals import call, refused, the_line, the_line_of

LONG, LARGE, WIDE = "1" + "0" * 400, "1" + "0" * 300, "1" + "0" * 30
MEMORY = 16 << 30  # bytes of addresses, so that a number taken at its word harms nobody else
NUMERIC = [name for name, option in OPTIONS.items() if option.kind in (int, float, tuple)]


def limited():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000, "-" + LONG], ids=["400", "5000", "-400"])
@pytest.mark.parametrize("name", NUMERIC)
def test_a_flag_of_hundreds_of_digits_is_refused(name, number):
    words = ["--model", "vim_micro", f"--{OPTIONS[name].flag}", number]
    words += [number] if OPTIONS[name].length == 2 else []
    line = refused(*words, names=[OPTIONS[name].flag])
    assert len(line) < 300


BIG = {
    "--epochs": LARGE,
    "--batch-size": WIDE,
    "--grad-accum-steps": WIDE,
    "--num_workers": WIDE,
    "--threads": WIDE,
    "--input-size": "1000000000",
    "--num-classes": WIDE,
    "--patch-size": WIDE,
    "--stride": WIDE,
    "--device": f"cuda:{LONG}",
    "--fusion-token": LARGE,
    "--fusion-layer": LARGE,
    "--fusion-plan": f"{LONG}:3",
    "--aa": f"rand-m{LONG}",
}
SCHEDULES = (
    *(f"r:{LONG}", f"r:3@{LONG}", f"r:3@1-{LONG}", f"ramp:{LONG},-1"),
    *(f"list:{LONG}", f"keep:0.8@{LONG}", f"keep:{LONG}@3", f"tokens:{LONG}@3"),
)


@pytest.mark.parametrize("flag", BIG)
def test_a_number_that_no_machine_can_have_is_refused(recipe, tmp_path, flag):
    words = [*recipe, flag, BIG[flag]]
    if flag == "--fusion-plan":
        words = [*recipe[: recipe.index("--fusion-strategy")], *recipe[-2:], flag, BIG[flag]]
    found = run(words, tmp_path / "run", limited, timeout=8)
    the_line_of(found, flag.removeprefix("--").replace("-", "_").split("_")[0])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda text: text[:8])
def test_a_schedule_with_such_a_number_is_refused(tmp_path, schedule):
    words = ["plan", "--model", "vim_micro", "--reduction", "ordered"]
    words += ["--reduction-schedule", schedule]
    found = run_alone(words, tmp_path / "out", limited, 15, cli.console)
    the_line_of(found, "reduction_schedule")


@pytest.mark.parametrize("option", ["power=" + LONG, "weight=" + LONG, "distance=" + LONG])
def test_an_option_of_a_method_with_such_a_number_is_refused(option):
    words = ["plan", "--model", "vim_micro", "--reduction", "mtr", "--reduction-schedule", "r:3"]
    refused(*words, "--reduction-options", option, program=cli.console)


SEARCH = ("search-plan", "{}", "--budget", "token-layers:0.7")
COMMANDS = {
    "table --seeds": ["table", "digits-table1", "--seeds"],
    "table --jobs": ["table", "digits-table1", "--jobs"],
    "bench --batch": ["bench", "scan", "--length", "4", "--batch"],
    "bench --rounds": ["bench", "scan", "--length", "4", "--rounds"],
    "bench --length": ["bench", "scan", "--length"],
    "bench --dim": ["bench", "scan", "--length", "4", "--dim"],
    "bench --warmup": ["bench", "scan", "--length", "4", "--warmup"],
    "bench --workers": ["bench", "data", "--workers"],
    "search-plan --steps": [*SEARCH, "--images", "8", "--steps"],
    "search-plan --trials": [*SEARCH, "--images", "8", "--trials"],
    "search-plan --images": [*SEARCH, "--images"],
    "search-plan --seed": [*SEARCH, "--images", "8", "--seed"],
    "export --images": ["export", "{}", "--format", "hf", "--noise", "--images"],
    "show --index": ["show", "{}", "--what", "layers", "--index"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_a_number_of_400_digits(whole, tmp_path, command):
    words = [str(whole) if word == "{}" else word for word in COMMANDS[command]]
    output = ["--output_dir", str(tmp_path / "new")] if words[0] in ("table", "export") else []
    found = run_alone([*words, LONG, *output], tmp_path / "out", limited, 10, cli.console)
    the_line_of(found, command.split("--")[1])
    assert not (tmp_path / "new").exists()


FLOATS = {
    "search-plan --budget": ["search-plan", "{}", "--budget", "token-layers:1e400"],
    "tune --margin": ["tune", "{}", "--margin", "1e400"],
    "export --tolerance": ["export", "{}", "--format", "hf", "--noise", "--tolerance", "inf"],
}


@pytest.mark.parametrize("command", FLOATS)
def test_a_command_refuses_an_infinite_number(whole, tmp_path, command):
    words = [str(whole) if word == "{}" else word for word in FLOATS[command]]
    output = ["--output_dir", str(tmp_path / "new")] if words[0] == "export" else []
    found = run_alone([*words, *output], tmp_path / "out", limited, 10, cli.console)
    the_line_of(found, command.split("--")[1])


def test_more_guesses_than_classes_are_all_of_them(whole, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    found = call("predict", whole, tmp_path / "a.png", "--topk", LONG, program=cli.console)
    assert found.status == 0
    assert len(found.out.splitlines()) == 101


GRID = """base: {base}
seeds: [0]
rows:
  - {{name: upper, fusion_strategy: upper, fusion_layer: 4, fusion_token: 3}}
"""
GRIDS = {
    "a seed": ("seeds: [0]", f"seeds: [{LONG}]"),
    "a seed of 5000 digits": ("seeds: [0]", f"seeds: [{'1' * 5000}]"),
    "an infinite seed": ("seeds: [0]", "seeds: [.inf]"),
    "epochs": ("seeds: [0]", f"seeds: [0]\\nfinetune: {{epochs: {LONG}}}"),
    "a name": ("name: upper", f"name: [upper, {LONG}]"),
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
    (tmp_path / "grid.yaml").write_text(text.replace(old, new.replace("\\n", "\n")))
    words = ["table", "--grid", tmp_path / "grid.yaml", "--output_dir", tmp_path / "new"]
    the_line(call(*words, program=cli.console), "grid.yaml")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize(
    "text", [LONG, "-" + LONG, "1" * 5000, ".inf", ".nan"], ids=lambda t: t[:5]
)
def test_a_file_of_settings_refuses_such_a_number(tmp_path, name, text):
    value = f"[{text}, {text}]" if OPTIONS[name].kind is tuple else text
    (tmp_path / "a.yaml").write_text(f"model: vim_micro\n{name}: {value}\n")
    refused("--config", tmp_path / "a.yaml", names=["a.yaml"])


STATES = ("images_per_update", "epoch", "updates", "best_acc1", "seconds", "peak_mib", "world")


def put(name, value):
    def change(state):
        state[name] = value

    return change


@pytest.mark.parametrize("name", [*STATES, "mean", "std", "grid", "num_classes", "losses"])
def test_a_checkpoint_with_a_number_of_400_digits_is_refused(tmp_path, name):
    many = {"mean": 3, "std": 3, "grid": 2, "losses": 2}.get(name)
    value = int(LONG) if many is None else [int(LONG)] * many
    path = made.run(tmp_path / "checkpoint.pth", change=put(name, value))
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{name}[^\n]*$"):
        fambav.from_pretrained(path)


@pytest.mark.parametrize("name", ["epochs", "lr", "input_size", "seed", "fusion_token"])
def test_a_checkpoint_with_such_a_setting_is_refused(tmp_path, name):
    def change(state):
        state["config"][name] = int(LONG)

    path = made.run(tmp_path / "checkpoint.pth", change=change)
    with pytest.raises(ValueError, match=rf"^[^\n]*{name}[^\n]*$"):
        fambav.from_pretrained(path)


ARGUMENTS = {
    "img_size": lambda n: timm.create_model("vim_micro", img_size=n),
    "patch_size": lambda n: timm.create_model("vim_micro", patch_size=n),
    "stride": lambda n: timm.create_model("vim_micro", stride=n),
    "num_classes": lambda n: timm.create_model("vim_micro", num_classes=n),
    "in_chans": lambda n: timm.create_model("vim_micro", in_chans=n),
    "depth": lambda n: timm.create_model("vim_micro", depth=n),
    "dim": lambda n: timm.create_model("vim_micro", dim=n),
    "drop_path_rate": lambda n: timm.create_model("vim_micro", drop_path_rate=n),
    "schedule": lambda n: fambav.reduce(timm.create_model("vim_micro"), "ordered", n),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_400_digits_is_refused(name):
    sentence = rf"^[^\n]*{name}[^\n]*, expected [^\n]*$"
    with torch.device("meta"), pytest.raises((ValueError, TypeError), match=sentence):
        ARGUMENTS[name](int(LONG))
