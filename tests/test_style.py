"""Limits that no linter checks."""

import ast
from pathlib import Path

import pytest

import fambav

FILES = sorted(Path(fambav.__file__).parent.rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 500, 60, 120
KERNELS = ("triton.jit", "kernel(")  # what compiles a function for a GPU, and for a CPU
VAGUE = {"utils", "helpers", "common", "misc", "v2", "new", "old"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            kernel = any(text.startswith(KERNELS) for text in decorators)
            limit = MAX_KERNEL if kernel else MAX_FUNCTION
            assert node.end_lineno - node.lineno < limit, f"{node.name} has over {limit} lines"


def test_the_package_holds_code_and_nothing_that_a_tool_left_behind():
    found = {path for path in Path(fambav.__file__).parent.rglob("*") if path.is_file()}
    made = {path for path in found if "__pycache__" not in path.parts}
    folder = Path(fambav.__file__).parent
    assert made - set(FILES) == {folder / "viz" / "page.html", folder / "py.typed"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_named_by_the_noun_it_defines(path):
    assert path.stem not in VAGUE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_torch_and_numpy_read_data_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            wanted = {"weights_only": "True"} if "torch" in ast.unparse(node.func) else {}
            assert wanted.items() <= given.items()
            assert given.get("allow_pickle", "False") == "False"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_caught_blindly_or_left_to_do(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
        assert not (isinstance(node, ast.Name) and node.id == "NotImplementedError")
