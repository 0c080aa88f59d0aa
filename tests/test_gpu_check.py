"""The script for a machine with a GPU runs to its end on one without."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.trust import forked
from tests.trust.forked import run_alone

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/gpu_check.sh"
TEXT = SCRIPT.read_text()
PARTS = {
    word: " ".join(re.findall(rf'^{name}\+?="(.*)"$', TEXT, re.MULTILINE)).split()
    for name, word in (("steps", ""), ("later", "--more"))
}
REFUSED = "smoke_graphs"  # on a CPU
# Without a GPU another step again, but for sizes and a dtype.
SAME = {"scan_small", "step_small", "block_small", "kernels_float32"}


def gpu_check(*words, python=sys.executable):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(python)},
        check=False,
    )


def provenance(path):
    """What the file of a step says about the machine and the code; of tests, that some ran."""
    if not path.with_suffix(".xml").exists():
        figures = json.loads(path.with_suffix(".json").read_text())
        return figures.get("settings") or figures["environment"]
    (suite,) = ElementTree.parse(path.with_suffix(".xml")).getroot()
    assert int(suite.get("tests")) > int(suite.get("skipped"))
    return {found.get("name"): found.get("value") for found in suite.iter("property")}


def made_launcher(folder):
    """A Python that notes how it was started, sees a GPU, and ends with $STATUS."""
    path = folder / "python"
    note = f'echo "$PYTHONPATH|$TRITON_INTERPRET|$(printf "%q " "$@")" >>{folder}/started'
    path.write_text(f"#!/usr/bin/env bash\n{note}\nexit ${{STATUS:-0}}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def launcher(tmp_path):
    return made_launcher(tmp_path)


def rows(folder):
    return [json.loads(row) for row in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The words after `python` of every step of a dry run, and the folder of its files."""
    found, folder = {}, tmp_path_factory.mktemp("dry")
    launcher = made_launcher(folder)
    for part in PARTS:
        (folder / "started").unlink(missing_ok=True)
        gpu_check("--dry", *part.split(), folder, python=launcher)
        started = [line.split("|", 2) for line in (folder / "started").read_text().splitlines()]
        names = [row["step"] for row in rows(folder)][-len(started) :]
        assert {interpreted for _, interpreted, _ in started} == {"1"}
        found |= dict(zip(names, (shlex.split(words) for *_, words in started), strict=True))
    assert sorted(found) == sorted([*PARTS[""], *PARTS["--more"]])
    return found, folder


STEPS = [s for part in PARTS.values() for s in part if s not in {*SAME, "smoke"}]


@pytest.mark.parametrize("step", STEPS)
def test_every_step_ends_without_a_gpu_and_leaves_its_figures(step, commands, tmp_path):
    """In a process that has imported everything; the next test has one step by the script."""
    words, folder = commands[0][step], commands[1]
    done = run_alone(words, tmp_path / "out", timeout=200, program=forked.python)
    assert done.status == (2 if step == REFUSED else 0), done.out
    assert step == REFUSED or provenance(folder / step)["commit"]


@pytest.mark.slow
def test_one_step_runs_alone_and_a_failure_is_a_status(launcher, tmp_path, monkeypatch):
    out = tmp_path / "out"
    done = gpu_check("--dry", "--only", "smoke", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"smoke", "smoke.json", "steps.jsonl"}
    assert provenance(out / "smoke")["commit"]
    monkeypatch.setenv("STATUS", "3")
    assert gpu_check("--dry", "--only", "roofline", out, python=launcher).returncode == 1
    assert [(row["step"], row["status"]) for row in rows(out)] == [("smoke", 0), ("roofline", 3)]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_starts_each_of_its_steps_once(part, launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/carried")
    done = gpu_check(*part.split(), tmp_path / "out", python=launcher)
    assert done.returncode == 0, done.stderr
    assert sorted(row["step"] for row in rows(tmp_path / "out")) == sorted(PARTS[part])
    started = (tmp_path / "started").read_text().splitlines()
    assert all(line.startswith(f"{ROOT}:/carried|") for line in started)
    for goal in ("bench step", "bench strategies", "bench infer") if not part else ():
        assert any(goal in line and "--cuda-graphs" in line for line in started)


@pytest.mark.parametrize("part", PARTS)
def test_the_limits_of_a_part_fit_into_its_time(part):
    on_a_gpu = TEXT.split("\nelse\n")[1]
    limits = dict(
        re.findall(r"^ +(?:bench|smoke|script|check) (\w+) (\d+)\b", on_a_gpu, re.MULTILINE)
    )
    kinds, each = re.search(r"for op in (.*); do\n +check \S+ (\d+)", on_a_gpu).groups()
    limits |= {f"check_{kind}": each for kind in kinds.split()}
    assert limits.keys() == {*PARTS[""], *PARTS["--more"]}
    assert sum(int(limits[name]) for name in PARTS[part]) <= int(TEXT.split("total=")[1].split()[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "scna"], "--only is 'scna', expected one of check_norm"),
        (["--only"], "--only is '', expected one of check_norm"),
        (["--wet"], "option is --wet, expected --more, --only or --dry"),
    ],
)
def test_a_wrong_option_is_one_line(words, message):
    done = gpu_check(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
