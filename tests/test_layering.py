"""Who may import whom: only a higher rank imports a lower one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fambav

RANK = {
    "short_repr": -2,
    "registry": -1,
    "arguments": 0,
    "json_files": 1,
    "launcher": 0,
    "timm_compat": 0,
    "seeding": 0,
    "text": 0,
    "table": 1,
    "pickles": 0,
    "pareto": 0,
    "ops": 1,
    "layers": 2,
    "reduction": 3,
    "models": 4,
    "heads": 5,
    "config": 5,
    "data": 6,
    "tasks": 7,
    "engine": 8,
    "training": 9,
    "flops": 10,
    "bench": 11,
    "experiments": 11,
    "search": 12,
    "export": 12,
    "viz": 13,
    "viz.trace": 5,  # arrays alone, for what a run draws of itself
    "viz.patches": 6,
    "commands": 14,
    "cli": 15,
    "__main__": 16,
}
ROOT = Path(fambav.__file__).parent
FILES = sorted(set(ROOT.rglob("*.py")) - {ROOT / "__init__.py"})


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside fambav are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path):
    return str(path.relative_to(ROOT))


def part(names):
    """The module of a package if it has a rank of its own, else the package."""
    module = ".".join(names[:2])
    return module if module in RANK else names[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    own = part(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports(path):
        if name.startswith("fambav."):
            other = part(name.split(".")[1:])
            assert other == own or RANK[other] < RANK[own], f"{own} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_timm_and_torchvision_come_through_one_module(path):
    if path.name != "timm_compat.py":
        assert not [n for n in imports(path) if n.split(".")[0] in ("timm", "torchvision")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_models_are_told_apart_by_type_or_name(path):
    if path.parent.name == "models":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", None))
            read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert called != "isinstance" or not read & {"Vim", "PlainMamba"}
            prefix = called in ("startswith", "removeprefix") and words & {"vim", "plainmamba"}
            assert not prefix, "a model tells its family"


@pytest.mark.parametrize("path", sorted((ROOT / "engine").glob("*.py")), ids=name_of)
def test_the_engine_knows_neither_settings_nor_models(path):
    parts = {name.split(".")[1] for name in imports(path) if name.startswith("fambav.")}
    assert not parts & {"config", "data", "models", "reduction"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("fambav", ("torch", "numpy", "yaml")),
        ("fambav.cli", ("torch", "timm", "numpy", "sklearn")),
        ("fambav.tasks.classification", ("torch", "timm", "numpy")),
        ("fambav.experiments", ("torch", "timm")),
        ("fambav.ops", ("timm", "torchvision", "mamba_ssm", "triton", "numba", "matplotlib")),
    ],
)
def test_importing_a_part_does_not_load_the_whole(module, unwanted):
    code = f"import sys, {module}; print([n for n in {unwanted!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
