"""FAMBAV_BACKEND, read when operations are imported: refused before anything is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trust.refusals import content

ROOT = Path(__file__).resolve().parents[2]
MANY = """
import contextlib, io, json, sys
from fambav import cli
answers = []
for program, words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        status = getattr(cli, program)(words)
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def answers(backend, *programs):
    """What programs say, one after the other in one process, with that variable set."""
    given = [(program, [str(word) for word in words]) for program, words in programs]
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "FAMBAV_BACKEND": backend, "OMP_NUM_THREADS": "1"},
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(answers, backend):
    for status, out, err in answers:
        assert status == 2, out + err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "FAMBAV_BACKEND" in err
        assert repr(backend) in err
        assert "Epoch" not in out


def test_a_backend_that_there_is_not_is_refused_before_a_run_is_moved(whole, recipe, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = content(folder)
    *refused, listed, told = answers(
        "garbage",
        ("main", [*recipe, "--output_dir", folder]),
        ("main", [*recipe, "--output_dir", folder, "--resume", "auto", "--epochs", "4"]),
        ("main", [*recipe, "--eval", "--resume", folder / "checkpoint.pth"]),
        ("console", ["predict", folder, tmp_path / "none.png"]),
        ("console", ["show", folder, "--what", "layers"]),
        ("console", ["bench", "scan", "--batch", "1", "--length", "4", "--rounds", "1"]),
        ("console", ["table", "digits", "--output_dir", tmp_path / "grid"]),
        ("console", ["list", "backends"]),
        ("console", ["doctor"]),
    )
    assert content(folder) == before
    assert not (tmp_path / "grid").exists()
    assert [listed[0], told[0]] == [0, 0], "what needs no scan goes on"
    check(refused, "garbage")


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs there")
def test_a_backend_that_cannot_run_here_is_refused_before_a_run_is_moved(whole, recipe, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = content(folder)
    refused = answers("cuda", ("main", [*recipe, "--output_dir", folder]))
    assert content(folder) == before
    check(refused, "cuda")
