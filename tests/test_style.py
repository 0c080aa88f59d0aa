"""Limits that no linter checks."""

import ast
import functools
from pathlib import Path

import fambav

FOLDER = Path(fambav.__file__).parent
FILES = {path: path.read_text() for path in sorted(FOLDER.rglob("*.py"))}
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 500, 60, 120
KERNELS = ("triton.jit", "kernel(")  # what compiles a function for a GPU, and for a CPU
VAGUE = {"utils", "helpers", "common", "misc", "v2", "new", "old"}


@functools.cache
def nodes():
    return [(path, node) for path, text in FILES.items() for node in ast.walk(ast.parse(text))]


def test_files_and_functions_are_short():
    for path, text in FILES.items():
        assert len(text.splitlines()) <= MAX_FILE, path
    for path, node in nodes():
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            kernel = any(text.startswith(KERNELS) for text in decorators)
            limit = MAX_KERNEL if kernel else MAX_FUNCTION
            assert node.end_lineno - node.lineno < limit, f"{path}: {node.name} has over {limit}"


def test_the_package_holds_code_and_nothing_that_a_tool_left_behind():
    found = {path for path in FOLDER.rglob("*") if path.is_file()}
    made = {path for path in found if "__pycache__" not in path.parts}
    assert made - FILES.keys() == {FOLDER / "viz" / "page.html", FOLDER / "py.typed"}


def test_a_file_is_named_by_the_noun_it_defines():
    assert not {path.stem for path in FILES} & VAGUE


def test_torch_and_numpy_read_data_alone():
    for path, node in nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            wanted = {"weights_only": "True"} if "torch" in ast.unparse(node.func) else {}
            assert wanted.items() <= given.items(), path
            assert given.get("allow_pickle", "False") == "False", path


def test_nothing_is_caught_blindly_or_left_to_do():
    for path, node in nodes():
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path
        assert not (isinstance(node, ast.Name) and node.id == "NotImplementedError"), path
