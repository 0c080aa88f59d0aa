"""Loader processes of every start method, of main.py and of the script that README shows."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.made import made_cifar

ROOT = Path(__file__).resolve().parents[2]
METHODS = multiprocessing.get_all_start_methods()
WORDS = """--model vim_micro --data-set CIFAR --data-path . --input-size 16 --epochs 1
    --batch-size 8
    --num_workers 1 --threads 1 --warmup-epochs 0 --device cpu --no-repeated-aug --no-model-ema"""
START = """
import multiprocessing, sys
from fambav.cli import main
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1))
    raise SystemExit(main())
"""
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def shown():
    """README's script of a reducer of one's own, with the end that README gives it."""
    section = (
        (ROOT / "README.md").read_text().split("## A reducer of your own")[1].split("\n## ")[0]
    )
    (script, *_) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return script, section


def started(script, words, folder, python=sys.executable):
    made_cifar(script.parent, train=40, test=16)
    return subprocess.run(
        [python, str(script), *words, "--output_dir", str(folder)],
        cwd=script.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_the_end_that_is_shown_is_guarded():
    script, section = shown()
    assert "raise SystemExit(main())" in section
    assert 'if __name__ == "__main__":' in section
    compile(script, "README.md", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_script_of_readme_runs_once_under_every_start_method(tmp_path, method):
    script = tmp_path / "quiet.py"
    script.write_text(shown()[0] + START)
    words = [method, *WORDS.split(), "--reduction", "quiet", "--reduction-schedule", "r:2@3"]
    done = started(script, words, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run folder: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fork"}))
def test_a_script_that_is_not_guarded_is_told_so_in_a_line(tmp_path, method):
    script = tmp_path / "bare.py"
    text = START.replace('if __name__ == "__main__":', "if True:").replace(
        "    multiprocessing.set_start_method(sys.argv.pop(1))",
        "    multiprocessing.set_start_method(sys.argv.pop(1) if len(sys.argv) > 1 and"
        ' not sys.argv[1].startswith("-") else None, force=True)',
    )
    script.write_text(text)
    done = started(script, [method, *WORDS.split()], tmp_path / "run")
    assert done.returncode in (2, 5), done.stdout[-1000:] + done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines
    assert all("__main__" in line for line in lines)
    assert "Traceback" not in done.stderr
    assert done.stdout.count("run folder: ") == 1


def other(version):
    """A Python of that version that has all packages, or why there is none."""
    if version == "{}.{}".format(*sys.version_info):
        return sys.executable
    for place in (os.environ.get(f"FAMBAV_PYTHON_{version.replace('.', '_')}"), f"python{version}"):
        if place is None:
            continue
        probe = [place, "-c", "import torch, timm, sklearn, yaml, safetensors"]
        try:
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                return place
        except OSError:
            continue
    return pytest.skip(f"Python {version} with the packages is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_other_pythons_train_by_their_own_start_method(tmp_path, version):
    python = other(version)
    script = tmp_path / "go.py"
    script.write_text(START.replace("sys.argv.pop(1)", "None"))
    done = started(script, WORDS.split(), tmp_path / "run", python)
    assert done.returncode == 0, done.stderr[-3000:]
