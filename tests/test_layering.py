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
FILES = {
    path: [*ast.walk(ast.parse(path.read_text()))]
    for path in sorted(set(ROOT.rglob("*.py")) - {ROOT / "__init__.py"})
}


def imports(path):
    for node in FILES[path]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside fambav are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(names):
    """The module of a package if it has a rank of its own, else the package."""
    module = ".".join(names[:2])
    return module if module in RANK else names[0]


def test_imports_point_down():
    for path in FILES:
        own = part(path.relative_to(ROOT).with_suffix("").parts)
        for name in imports(path):
            if name.startswith("fambav."):
                other = part(name.split(".")[1:])
                points_down = other == own or RANK[other] < RANK[own]
                assert points_down, f"{path}: {own} must not import {other}"


def test_timm_and_torchvision_come_through_one_module():
    for path in FILES:
        if path.name != "timm_compat.py":
            outside = [n for n in imports(path) if n.split(".")[0] in ("timm", "torchvision")]
            assert outside == [], path


def test_only_models_are_told_apart_by_type_or_name():
    calls = [
        (path, node)
        for path, nodes in FILES.items()
        for node in nodes
        if path.parent.name != "models" and isinstance(node, ast.Call)
    ]
    for path, node in calls:
        called = getattr(node.func, "id", getattr(node.func, "attr", None))
        if called == "isinstance":
            read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert not read & {"Vim", "PlainMamba"}, path
        if called in ("startswith", "removeprefix"):
            words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not words & {"vim", "plainmamba"}, f"{path}: a model tells its family"


def test_the_engine_knows_neither_settings_nor_models():
    for path in (ROOT / "engine").glob("*.py"):
        parts = {name.split(".")[1] for name in imports(path) if name.startswith("fambav.")}
        assert not parts & {"config", "data", "models", "reduction"}, path


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
