"""The script for a machine with a GPU runs to its end on one without."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/gpu_check.sh"
TEXT = SCRIPT.read_text()
PARTS = {
    word: " ".join(re.findall(rf'^{name}\+?="(.*)"$', TEXT, re.MULTILINE)).split()
    for name, word in (("steps", ""), ("later", "--more"))
}
NO_REPORT = {"smoke_graphs"}  # on a CPU it is a refusal
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


@pytest.mark.slow
@pytest.mark.parametrize("step", [s for part in PARTS.values() for s in part if s not in SAME])
def test_every_step_ends_without_a_gpu_and_leaves_its_figures(step, tmp_path):
    done = gpu_check("--dry", "--only", step, tmp_path)
    (row,) = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert (row["step"], row["status"], done.returncode) == (step, 0, 0), done.stdout + done.stderr
    if step not in NO_REPORT:
        assert provenance(tmp_path / step)["commit"]


@pytest.fixture
def launcher(tmp_path):
    """A Python that notes how it was started and sees a GPU."""
    path = tmp_path / "python"
    path.write_text(f'#!/usr/bin/env bash\necho "$PYTHONPATH|$*" >>{tmp_path}/started\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("part", PARTS)
def test_a_part_starts_each_of_its_steps_once(part, launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/carried")
    done = gpu_check(*part.split(), tmp_path / "out", python=launcher)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (tmp_path / "out/steps.jsonl").read_text().splitlines()]
    assert sorted(row["step"] for row in rows) == sorted(PARTS[part])
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


@pytest.mark.slow
def test_one_step_runs_alone_and_a_failure_is_a_status(tmp_path):
    done = gpu_check("--dry", "--only", "roofline", tmp_path)
    assert done.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"roofline.json", "steps.jsonl"}
    (tmp_path / "roofline.json").unlink()
    (tmp_path / "roofline.json").mkdir()  # cannot be written
    assert gpu_check("--dry", "--only", "roofline", tmp_path).returncode == 1
    first, second = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert first["status"] == 0
    assert second["status"] != 0


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
