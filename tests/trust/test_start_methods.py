"""Loader processes of every start method, of the script that docs/reducer.md shows."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.made import made_cifar

ROOT = Path(__file__).resolve().parents[2]
# Under fork it runs in tests/test_readme.py.
METHODS = sorted({*multiprocessing.get_all_start_methods()} - {"fork"})
WORDS = """--model vim_micro --data-set CIFAR --data-path . --input-size 16 --epochs 1
    --batch-size 8 --num_workers 1 --threads 1 --warmup-epochs 0 --device cpu --no-repeated-aug
    --no-model-ema --output_dir run"""
QUIET = "--reduction quiet --reduction-schedule r:2@3"
GUARD = 'if __name__ == "__main__":'
SET = "multiprocessing.set_start_method(sys.argv.pop(1))"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def shown():
    """The manual's script of a reducer of one's own, and its end."""
    page = (ROOT / "docs" / "reducer.md").read_text()
    script, end = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return script, end


def started(folder, text, words, python=sys.executable):
    """Run a script of this text where there is a made data set."""
    made_cifar(folder, train=16, test=8)
    (folder / "quiet.py").write_text(text)
    return subprocess.run(
        [python, "quiet.py", *words.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_script_of_the_manual_runs_once_where_processes_are_not_forked(tmp_path, method):
    script, end = shown()
    assert GUARD in end
    end = end.replace(GUARD, f"{GUARD}\n    import multiprocessing, sys; {SET}")
    done = started(tmp_path, script + end, f"{method} {WORDS} {QUIET}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run folder: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_a_script_without_the_guard_is_refused_before_anything_is_written(tmp_path, method):
    _, end = shown()
    # The word that names the method is there in the process that was started by hand alone.
    bare = end.replace(GUARD, f"if True:\n    if sys.argv[1] == {method!r}:\n        {SET}")
    done = started(tmp_path, f"import multiprocessing, sys\n{bare}", f"{method} {WORDS}")
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors
    assert all("__main__" in line for line in errors)
    assert method in errors[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def other(version):
    """A Python of that version that has all packages, or why there is none."""
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
@pytest.mark.parametrize("version", sorted({*PYTHONS} - {"{}.{}".format(*sys.version_info)}))
def test_other_pythons_train_by_their_own_start_method(tmp_path, version):
    python = other(version)
    script, end = shown()
    done = started(tmp_path, script + end, f"{WORDS} {QUIET}", python)
    assert done.returncode == 0, done.stderr[-3000:]
