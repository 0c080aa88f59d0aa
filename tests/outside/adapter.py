"""Runs tests of other projects on our functions, from checkouts that lie elsewhere.

A test file of theirs is compiled with four changes: what it imports from its own package is a
stand-in with our function beside their reference, "cuda" reads "cpu" where there is no GPU, marks
that sort their tests into groups go, and a test may run over the longer lists of values that stand
beside its decorators as comments.
"""

import ast
import os
import re
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from unittest import mock

import pytest
import torch

KEPT = {"torch", "einops", "math"}  # what a reference may import
COMMENTED = re.compile(r"\s*#\s*@pytest\.mark\.parametrize\(\s*['\"](\w+)['\"],\s*(\[.*\])\s*\)")


def checkout(variable):
    """The folder that a variable of the environment names, or None."""
    folder = os.environ.get(variable)
    return Path(folder) if folder else None


def published(variable, path, name, stand_ins):
    """A test of theirs, ready to be collected by pytest.

    Args:
        variable: Names the checkout.  Without one the test is there, to be skipped and counted.
        path: Of the test file in the checkout.
        name: Of the test.
        stand_ins: Takes the checkout's folder; returns the modules that the file imports, by name.
    """
    folder = checkout(variable)
    if folder is None:

        def absent():
            raise AssertionError(f"{variable} names no checkout")

        return absent
    tree = ast.parse((folder / path).read_text(), filename=str(folder / path))
    tree = _WithoutOwnMarks().visit(tree)
    if not torch.cuda.is_available():
        tree = _OnCpu().visit(tree)
    shown = {"__name__": Path(path).stem}
    with mock.patch.dict(sys.modules, stand_ins(folder)):
        exec(compile(tree, str(folder / path), "exec"), shown)
    return shown[name]


def over(test, values):
    """The same test over other lists of values, for some of its arguments."""
    values = grid(test) | values
    parts = (test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    again = FunctionType(*parts)
    again.pytestmark = [pytest.mark.parametrize(n, these).mark for n, these in values.items()]
    return again


def grid(test):
    """The lists of values that a test runs over, by argument."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    return {mark.args[0]: list(mark.args[1]) for mark in marks}


def commented(variable, path, name):
    """The longest list of real values that stands as a comment at a test, for each argument."""
    folder = checkout(variable)
    if folder is None:
        return {}
    before, _, _ = (folder / path).read_text().partition(f"\ndef {name}(")
    found = {}
    for line in reversed(before.splitlines()):
        if not line:
            break
        if listed := COMMENTED.match(line):
            values = [v for v in eval(listed[2], {"torch": torch}) if not _is_complex(v)]
            found[listed[1]] = max(values, found.get(listed[1], []), key=len)
    return found


def longest(test, lists):
    """The same test over whichever list is longer, its own or the one given."""
    own = grid(test)
    return over(test, {n: max(own[n], these, key=len) for n, these in lists.items()})


def reference(path, name):
    """One function of a file of theirs, without the compiled modules that the file imports."""
    tree = ast.parse(path.read_text(), filename=str(path))
    wanted = [node for node in tree.body if getattr(node, "name", None) == name]
    tree.body = [node for node in tree.body if KEPT & _imported(node)] + wanted
    shown = {}
    exec(compile(tree, str(path), "exec"), shown)
    return shown[name]


def package(name, **contents):
    """Stand-ins for a dotted module, which holds the contents, and for the packages above it."""
    parts = name.split(".")
    modules = {".".join(parts[: n + 1]): ModuleType(part) for n, part in enumerate(parts)}
    vars(modules[name]).update(contents)
    return modules


class _OnCpu(ast.NodeTransformer):
    def visit_Constant(self, node):
        return ast.copy_location(ast.Constant("cpu"), node) if node.value == "cuda" else node


class _WithoutOwnMarks(ast.NodeTransformer):
    """Takes away marks that sort their tests into groups, which are not ours."""

    def visit_FunctionDef(self, node):
        kept = [d for d in node.decorator_list if not _sorts(ast.unparse(d))]
        node.decorator_list = kept
        return node


def _sorts(decorator):
    name = decorator.removeprefix("pytest.mark.")
    return name != decorator and not name.startswith(("parametrize", "skipif", "filterwarnings"))


def _is_complex(value):
    return isinstance(value, torch.dtype) and value.is_complex


def _imported(node):
    if isinstance(node, ast.ImportFrom):
        return {node.module.split(".")[0]}
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return set()
