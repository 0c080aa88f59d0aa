"""The commands: thin, and honest about whose mistake it was."""

import argparse
import errno
import json
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

import fambav
from fambav import registry
from fambav.cli import COMMANDS, console, main
from fambav.commands import CONCERNS, bench
from fambav.config import OPTIONS, ConfigError, read_flags
from fambav.config.schema import GROUPS
from tests.made import refused, run

ROOT = Path(fambav.__file__).parents[1]
RUN = ["--model", "vim_micro"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def job(monkeypatch):
    """Replaces the run itself by a function."""

    def replace(function):
        monkeypatch.setattr("fambav.training.run", function)

    return replace


def failing(error):
    def run(_):
        raise error

    return run


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_without_its_place(job, capsys):
    job(lambda _: warnings.warn("weights.safetensors\nis old", stacklevel=1) or 0)
    before = warnings.showwarning
    assert main(RUN) == 0
    assert capsys.readouterr().err == "warning: weights.safetensors is old\n"
    assert warnings.showwarning is before


def test_main_hands_over_the_settings_and_returns_the_status(job):
    seen = []
    job(lambda run: seen.append(run) or 7)
    assert main([*RUN, "--epochs", "3"]) == 7
    assert seen[0].optim.epochs == 3


def test_the_first_line_tells_that_the_digits_run_is_read(job, capsys):
    job(lambda _: print("next") or 0)
    assert main(["--epochs", "3"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("reading configs/digits/vim_micro_upper.yaml")
    assert second == "next"


def test_a_named_model_makes_no_such_line(job, capsys):
    job(lambda _: 0)
    assert main(RUN) == 0
    assert capsys.readouterr().out == ""


def test_help_is_not_an_error(capsys):
    assert main(["--help"]) == 0
    assert "--fusion-strategy" in capsys.readouterr().out
    assert console(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name}" in shown
        assert console([name, "--help"]) == 0
        assert "usage: fambav " in capsys.readouterr().out


def test_help_is_by_concern_with_an_example_that_works(capsys):
    assert console(["--help"]) == 0
    shown = capsys.readouterr().out
    for concern, _, example in CONCERNS:
        assert f"\n{concern}\n" in shown
        assert f"\n  such as: {example}\n" in f"{shown}\n"
        assert example.split()[:2] == ["fambav", next(n for n in COMMANDS if n in example)]
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for group in GROUPS.values():
        assert f"{group.__doc__}\n  such as: {group.example}\n" in shown
        assert set(read_flags(group.example.split())) <= set(OPTIONS)


def test_the_version_is_that_of_the_package(capsys):
    assert [main(["--version"]), console(["--version"])] == [0, 0]
    assert capsys.readouterr().out == 2 * f"fambav {fambav.__version__}\n"
    assert metadata.version("fambav") == fambav.__version__


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("fambav tr", "train"),
        ("fambav list gr", "grids"),
        ("fambav train --fusion-str", "--fusion-strategy"),
        ("fambav train --fusion-strategy up", "upper"),
        ("fambav plan --model vim_mi", "vim_micro"),
        ("fambav train --config configs/digits/vim_micro_", "configs/digits/vim_micro_upper.yaml"),
    ],
)
def test_bash_completes_commands_flags_and_names(capsys, line, completed):
    assert console(["completion"]) == 0
    script = f"""{capsys.readouterr().out}
        COMP_WORDS=({line}) COMP_CWORD={line.count(" ")}
        _fambav
        echo "${{COMPREPLY[*]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (completed, "")


@pytest.mark.parametrize("module", ["fambav", "fambav.cli"])
def test_both_modules_are_the_console_script(module):
    words = [sys.executable, "-m", module, "list", "strategies"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()[0]) == (0, "none")


def test_fambav_train_is_main_py(job):
    seen = []
    job(lambda run: seen.append(run) or 7)
    assert console(["train", *RUN, "-b", "32", "--epochs", "3"]) == 7
    assert main([*RUN, "--batch-size", "32", "--epochs", "3"]) == 7
    assert seen[0] == seen[1]


def test_a_dry_run_prints_settings_and_plan_and_writes_nothing(job, capsys, tmp_path, monkeypatch):
    job(failing(KeyError("it must not start")))
    monkeypatch.chdir(tmp_path)
    words = "--data-set CIFAR --data-path no/such --fusion-strategy upper --fusion-layer 3"
    assert main([*RUN, *words.split(), "-b", "8", "--fusion-token", "9", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert {"batch_size: 8", "fusion_layer: 3", "data_path: no/such"} <= set(shown.splitlines())
    assert "total removed: 36 of 65 tokens" in shown
    assert "M weights with 100 outputs\nimages per update: 8 = 8 x 1 " in shown
    assert not list(tmp_path.iterdir())
    assert main(["--dry-run", "--eval", "--resume", "x"]) == 2


def test_tasks_of_slurm_that_no_launcher_started_are_noticed(job, capsys, monkeypatch):
    job(lambda _: 0)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert main(RUN) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("warning: SLURM_NTASKS is 4 and RANK is not set")
    assert err.count("\n") == 1
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert main(RUN) == 0
    for name, value in dict(RANK="0", WORLD_SIZE="1", SLURM_PROCID="0").items():
        monkeypatch.setenv(name, value)
    assert main(RUN) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "command is missing, expected one of train, evaluate"),
        (["plna"], "command is 'plna', expected a known name; did you mean 'plan'?"),
        (["plan", *RUN, "--lr", "x"], "--lr is 'x', expected a number"),
        (["plan", *RUN, "--fusion-strategy", "upper"], "fusion_layer is 11, expected 1 to 6"),
        (["plan", "--model", "timm/resnet10t"], "expected one whose tokens can be reduced"),
        (["plan", "--model", "timm/resnet10x"], "did you mean 'resnet10t'?"),
        (["plan", *RUN, "--input-size", "30"], "30"),
        (["flops", "--model", "timm/resnet10t"], "expected one of `fambav list models`"),
        (["flops", *RUN, "--data-set", "FOLDER"], "num_classes is None, expected a number with"),
        (["flops", *RUN, "--lr", "x"], "--lr is 'x', expected a number"),
        (["flops", "--json"], "argument --json: expected one argument"),
        (["list", "modles"], "invalid choice: 'modles'"),
        (["list"], "the following arguments are required"),
        (["bench"], "the following arguments are required"),
        (["bench", "scan", "--length", "x"], "--length is 'x', expected a whole number"),
        (["bench", "scan", "--leng", "3"], "unrecognized arguments: --leng 3"),
        (["bench", "scan", "--batch", "0"], "batch is 0, expected at least 1"),
        (["bench", "scan", "--warmup", "-1"], "warmup is -1, expected at least 0"),
        (["bench", "block", "--length", "9", "0"], "length is 0, expected at least 1"),
        (["bench", "step", "--device", "cpu", "--cuda-graphs"], "device is cpu, expected a CUDA"),
        (["bench", "strategies", "--plan", "upper:6"], "expected upper:layer:tokens"),
        (["bench", "floors"], "invalid choice: 'floors'"),
        (["bench", "scan", "--device", "cuda:99"], "device is cuda:99, expected"),
        (["doctor", "now"], "unrecognized arguments: now"),
        (["predict"], "images are missing, expected fambav predict RUN|CHECKPOINT IMAGE ..."),
        (["predict", "a.pth"], "images are missing"),
        (["predict", "a.pth", "b.png", "--topk", "0"], "--topk is 0, expected at least 1"),
        (["predict", "a.pth", "b.png", "--modle", "x"], "--modle is not a flag"),
        (["predict", "no.pth", "b.png"], "checkpoint is no.pth, expected a file that exists"),
        (["table"], "the following arguments are required: RUN"),
        (["table", "no/such"], "run is 'no/such', expected a folder with log.txt and config.yaml"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(capsys, words, message):
    assert console(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("train --config {}/settings/micr.yaml", "settings/micro.yaml"),
        ("train --config {}/setings/micro.yaml", "settings/micro.yaml"),
        ("table {}/rnu", "run"),
        ("show {}/run/chekpoint.pth", "run/checkpoint.pth"),
        ("predict {}/run/checkpoint.pth {}/flowr.png", "flower.png"),
        ("pareto {}/rum", "run"),
        ("train --config {}/quite_another", None),
        ("train --config {}/" + "x" * 300, None),
    ],
)
def test_a_mistyped_path_is_refused_with_the_closest_name(tmp_path, capsys, line, meant):
    tmp_path.joinpath("run").mkdir()
    run(tmp_path / "run" / "checkpoint.pth", model="vim_micro")
    for name in ("settings/micro.yaml", "flower.png"):
        tmp_path.joinpath(name).parent.mkdir(exist_ok=True)
        tmp_path.joinpath(name).touch()
    assert console(line.replace("{}", str(tmp_path)).split()) == 2
    error = capsys.readouterr().err
    hint = f"; did you mean {str(tmp_path / str(meant))!r}?\n"
    assert error.endswith(hint) if meant else "did you mean" not in error


class Worker(ValueError):
    """What a loader process raised, as torch passes it on: with its traceback in the text."""

    __module__ = "fambav.data.types"
    __qualname__ = "DataError"


TRACE = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
TRACE += 'last):\n  File "x.py", line 1\nfambav.data.types.DataError: a.png is damaged\n'
DIVERGED = type("DivergedError", (RuntimeError,), {"__module__": "fambav.engine.step"})
BACKEND = type("BackendError", (RuntimeError,), {"__module__": "fambav.ops.dispatch"})


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("lr is 3"), 2, "error: lr is 3"),
        (BACKEND("backend 'cuda' cannot run"), 2, "error: backend 'cuda' cannot run"),
        (DIVERGED("loss is nan"), 3, "error: loss is nan"),
        (Worker(TRACE), 2, "error: a.png is damaged"),
        (Worker("two\nlines"), 2, "error: two lines"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: permission den"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "error: no space left on device; no"),
        (MemoryError("Unable to allocate 9 TiB"), 6, "error: memory is full; a smaller --batch"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), 6, "error: memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_not_a_bug_is_one_line_with_its_status(job, capsys, error, status, line):
    job(failing(error))
    assert main(RUN) == status
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("too many values"), RuntimeError("shapes"), OSError("?"), KeyError("x")]
)
def test_a_bug_keeps_its_traceback(job, error):
    job(failing(error))
    with pytest.raises(type(error)):
        main(RUN)


def test_a_python_without_the_packages_is_one_line(job, capsys):
    def of_another_environment(config):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    job(of_another_environment)
    assert main(RUN) == 2
    line = f"error: package torch is not installed for {sys.executable}, expected the Python of"
    assert capsys.readouterr().err.startswith(line)


def test_a_value_error_of_this_package_is_the_users(job, capsys):
    job(lambda _: registry.REDUCERS["fuse"])
    assert main(RUN) == 2
    assert capsys.readouterr().err.startswith("error: reduction is 'fuse', expected")


def test_only_the_first_of_many_processes_speaks(job, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    job(failing(ConfigError("lr is 3")))
    assert main([]) == 2
    assert main([*RUN, "--lr", "abc"]) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert main([*RUN, "--lr", "abc"]) == 2
    assert capsys.readouterr().err == "error: --lr is 'abc', expected a number\n"


def test_a_reader_that_has_had_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    code = "from fambav.cli import console; raise SystemExit(console(['list', 'models']))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_main_py_is_the_same_program():
    words = [sys.executable, str(ROOT / "main.py"), "--modle", "x"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == (
        "",
        "error: --modle is not a flag; did you mean --model?\n",
    )


def test_plan_prints_the_tokens_of_the_readme_command(capsys):
    words = "--model vim_tiny --fusion-strategy upper --fusion-layer 4 --fusion-token 8"
    assert console(["plan", *words.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["1-3", "197", "-", "197"]
    assert [int(line.split()[3]) for line in lines[2:23]] == list(range(189, 28, -8))
    assert lines[23] == "total removed: 168 of 197 tokens"


def test_plan_reads_a_file_and_tells_which_if_none_is_named(capsys):
    path = ROOT / "configs/digits/vim_micro_upper.yaml"
    assert console(["plan", "--config", str(path)]) == 0
    named = capsys.readouterr().out
    assert console(["plan"]) == 0
    assert capsys.readouterr().out.split("\n", 1)[1] == named
    assert named.splitlines()[-2] == "total removed: 48 of 64 tokens"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("models", registry.MODELS),
        ("strategies", registry.STRATEGIES),
        ("methods", registry.METHODS),
        ("data-sets", registry.DATA_SETS),
        ("backends", registry.SCAN_BACKENDS),
    ],
)
def test_list_prints_the_names(capsys, kind, names):
    assert console(["list", kind]) == 0
    assert capsys.readouterr().out.splitlines()[: len(names)] == list(names)


def test_doctor_tells_of_every_backend_whether_it_can_run_here(capsys):
    from fambav.ops import backends
    from fambav.timm_compat import TORCHVISION

    assert console(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("python", "torch", "torchvision", "timm", "pillow", "triton"):
        assert f"\n{name} " in f"\n{shown}"
    lines = [line.split(maxsplit=2) for line in shown.splitlines()]
    assert ("`import timm` fails by itself" in shown) == (TORCHVISION == "shimmed")
    for op, backend, reason in backends():
        assert [op, backend, f"no: {reason}" if reason else "runs here"] in lines


def test_bench_prints_its_report_and_writes_it(capsys, tmp_path):
    target = tmp_path / "scan.json"
    words = "bench scan --batch 1 --length 6 4 --dim 4 --state 2 --rounds 1 --warmup 0 --json"
    assert console([*words.split(), str(target)]) == 0
    report = json.loads(target.read_text())
    assert report["settings"]["dim"] == 4
    assert {"cpu", "reference"} <= {row["backend"] for row in report["rows"]}
    assert {row["length"] for row in report["rows"]} == {6, 4}
    assert "over reference" in capsys.readouterr().out


def test_every_flag_of_a_benchmark_has_its_help():
    (kinds,) = (a for a in bench.parser()._actions if isinstance(a, argparse._SubParsersAction))
    for kind in kinds.choices.values():
        assert all(action.help for action in kind._actions), kind.prog


@pytest.mark.parametrize("flag", ["--output-dir", "--output_dir"])
def test_flags_of_commands_are_spelled_with_hyphens_or_underscores(flag, tmp_path):
    file = tmp_path / "a"
    file.write_text("")
    for command in (["export", "x", "--format", "hf"], ["pareto", "x"], ["predict", "x", "y"]):
        assert "unrecognized" not in refused(*command, f"{flag}={file}/b", program=console)
    assert f"output_dir is '{file}/b'" in refused(
        "table", "digits-table1", flag, f"{file}/b", program=console
    )


def test_a_data_set_alone_is_noticed_with_recipes(job, capsys):
    job(lambda _: 0)
    assert main(["--data-set", "DIGITS"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "note: --data-set DIGITS without --model or --config trains vim_tiny for"
    )
    assert "300 epochs; recipes for it: --config configs/digits/vim_micro.yaml, " in line
    assert main(["--data-set", "DIGITS", *RUN]) == 0
    assert capsys.readouterr().out == ""


def test_predict_prints_the_guesses_of_each_image(capsys, monkeypatch):
    seen = {}

    def answers(checkpoint, images, **rest):
        seen.update(rest, checkpoint=checkpoint, images=images)
        return [(image, ["   75.0%  cat", "   25.0%  dog"]) for image in images]

    monkeypatch.setattr("fambav.training.inference.answers", answers)
    assert console(["predict", "w.pth", "a.png", "b.png", "--topk", "2", "--device", "cpu"]) == 0
    assert seen == {
        "checkpoint": "w.pth",
        "images": ["a.png", "b.png"],
        "topk": 2,
        "device": "cpu",
        "config": None,
        "settings": {},
        "folder": None,
    }
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["a.png", "   75.0%  cat", "   25.0%  dog", "b.png", *shown[1:3]]
    assert console(["predict", "w.pth", "a.png", "--model", "vim_small"]) == 0
    assert seen["config"].model.model == "vim_small"


def test_table_compares_runs(capsys, tmp_path):
    from tests.experiments.test_runs import epoch, made

    runs = [str(made(tmp_path / name, [epoch(0)] * 3)) for name in ("one", "two")]
    assert console(["table", *runs]) == 0
    plain = capsys.readouterr().out
    assert [line.split()[0] for line in plain.splitlines()[1:3]] == ["one", "two"]
    assert console(["table", "--format", "markdown", *runs]) == 0
    assert capsys.readouterr().out.startswith("| run | model |")
