"""Compiled packages that are missing, broken or of another make."""

import importlib
import sys
from types import ModuleType

import pytest

from fambav.ops import BackendError, backends, kernels
from fambav.ops.kernels import Extension

NAME = "a_compiled_package"


class Broken:
    """A finder whose one package fails at import."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path, target=None):
        del path, target
        if name == NAME:
            raise self.error


@pytest.fixture(autouse=True)
def forget():
    kernels._module.cache_clear()
    yield
    kernels._module.cache_clear()


@pytest.fixture
def extension():
    return Extension(NAME, "forward", package="some-package 2")


def test_a_missing_package_is_said_to_be_missing(extension):
    want = "a_compiled_package is not installed; see some-package 2"
    assert extension.broken() == want
    with pytest.raises(BackendError, match=want):
        extension.call("forward")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("lib.so: undefined symbol: _ZN3c10\nmore"), "ImportError: lib.so: undefined"),
        (RuntimeError("CUDA driver too old"), "RuntimeError: CUDA driver too old"),
        (ValueError(), "ValueError: ValueError"),
        (ModuleNotFoundError("No module named 'wheel'", name="wheel"), "No module named 'wheel'"),
    ],
)
def test_whatever_an_import_raises_is_kept_and_told(monkeypatch, extension, error, told):
    monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])
    for _ in range(2):
        reason = extension.broken()
        assert reason.startswith(f"import of {NAME} fails: {told}")
        assert "\n" not in reason
        assert reason in extension.unavailable()


def test_a_module_without_the_function_is_refused(monkeypatch, extension):
    monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
    want = "a_compiled_package has no forward, expected that of some-package 2"
    assert extension.broken() == want
    with pytest.raises(BackendError, match=want):
        extension.call("forward")


def test_a_function_with_another_signature_is_refused(monkeypatch, extension):
    module = ModuleType(NAME)
    module.forward = lambda x: x
    monkeypatch.setitem(sys.modules, NAME, module)
    assert extension.broken() is None
    assert extension.call("forward", 3) == 3
    with pytest.raises(BackendError, match=r"forward does not take our arguments.*2 were given"):
        extension.call("forward", 1, 2)


def test_the_import_is_tried_once(monkeypatch, extension):
    tried = []

    def fail(name):
        tried.append(name)
        raise ImportError("no")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert extension.broken() == extension.broken()
    assert tried == [NAME]


def test_every_backend_tells_why_its_package_does_not_load(monkeypatch):
    for name in ("selective_scan_cuda", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    reasons = {op: reason for op, name, reason in backends() if name == "cuda"}
    assert "selective_scan_cuda" in reasons["selective_scan"]
    assert "mamba-ssm" in reasons["selective_scan"]
    assert "causal_conv1d" in reasons["causal_conv1d"]
