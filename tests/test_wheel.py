"""The package as it is installed: what a wheel holds, and that it works far from a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fambav import registry

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


def ran(*words, cwd, path="", code=0):
    """Run Python elsewhere; return what it printed."""
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, in which builders may leave what they like."""
    folder = tmp_path_factory.mktemp("beside") / "fambav"
    folder.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("fambav", "configs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    ran("-m", "pip", "wheel", *options, source, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel):
    """The folder that the wheel is installed in."""
    folder = wheel.parent / "site"
    options = ("--no-deps", "--no-index", "--target", folder)
    ran("-m", "pip", "install", *options, wheel, cwd=wheel.parent)
    return folder


def test_a_wheel_holds_the_package_its_types_and_its_settings(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "fambav").rglob("*.py")}
    settings = {f"fambav/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert names == code | settings | {"fambav/py.typed", "fambav/viz/page.html"}


TRAIN = """
import sys, fambav
from fambav.cli import console
print(fambav.__file__, fambav.reduce.__name__)
raise SystemExit(console(sys.argv[1:]))
"""


def test_an_installed_package_lists_and_trains_anywhere(site, tmp_path):
    given = dict(cwd=tmp_path, path=site)
    assert ran("-m", "fambav", "list", "grids", **given).split() == list(registry.grids())
    listed = ran("-m", "fambav.cli", "list", "configs", **given)
    assert listed.split() == list(registry.configs())
    words = """train --config configs/digits/vim_micro_upper.yaml --patch-size 16 --fusion-plan 3:1
        --scan-backend cpu --epochs 1 --batch-size 256 --num_workers 0 --no-model-ema
        --output_dir run"""
    printed = ran("-c", TRAIN, *words.split(), **given)
    assert printed.splitlines()[0] == f"{site}/fambav/__init__.py reduce"
    assert "Training time" in printed
    assert (tmp_path / "run" / "best_checkpoint.pth").is_file()


def test_an_editable_installation_is_not_hidden_by_the_folder_of_the_checkout(source, tmp_path):
    build = (
        "from setuptools import build_meta as b; import sys; print(b.build_editable(sys.argv[1]))"
    )
    ran("-c", build, tmp_path, cwd=source)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    script = source.parent / "beside.py"
    where = "from importlib.util import find_spec\nprint(find_spec('fambav').origin)\n"
    script.write_text(f"import site; site.addsitedir({str(tmp_path)!r})\n{where}")
    printed = ran("-S", script, cwd=source.parent, path=Path(os.__file__).parent)
    assert printed == f"{source}/fambav/__init__.py\n"
