"""One thread, NaN in memory that nobody wrote, Triton interpreted, what a machine cannot run."""

import gc
import json
import os
import platform
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is defined, so before anything imports one
    os.environ["TRITON_INTERPRET"] = "1"

import fambav.timm_compat  # noqa: F401  before any test imports timm or torchvision
from fambav.engine.run_dir import environment
from fambav.registry import REDUCERS

torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from triton.runtime import interpreter

    def prepare(fn, real=interpreter._patch_lang, tl=interpreter.tl):
        """Patch the language for a kernel, but not again for each function that it calls.

        The interpreter does both; the second takes a third of its time and changes nothing.
        """
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return real(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = prepare

# Why a test with the mark cannot run here, or None; called with the mark's arguments.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CANNOT_RUN = {
    "browser": lambda: None if any(map(shutil.which, BROWSERS)) else "needs Chromium",
    "extra": lambda name: None if find_spec(name) else f"needs {name}",
    "gpu": lambda *modules: (
        next((f"needs {name}" for name in modules if find_spec(name) is None), None)
        if torch.cuda.is_available()
        else "needs a CUDA device"
    ),
    "outside": lambda name: None if os.environ.get(name) else f"{name} names no checkout",
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)  # also makes torch.empty return NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def registry():
    """Reducers that a test registers are forgotten behind it."""
    before = dict(REDUCERS._builders)
    yield
    REDUCERS._builders.clear()
    REDUCERS._builders.update(before)


@pytest.fixture(scope="session", autouse=True)
def provenance(request, record_testsuite_property):
    """Let a file of results say what was tested where."""
    if request.config.getoption("xmlpath", None):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        record_testsuite_property("device", device)
        for name, value in environment().items():
            record_testsuite_property(name, value)


def pytest_collection_modifyitems(items):
    for item in items:
        for mark, refuses in CANNOT_RUN.items():
            found = item.get_closest_marker(mark)
            if found and (reason := refuses(*found.args)):
                item.add_marker(pytest.mark.skip(reason=f"{mark}: {reason}"))


def pytest_collection_finish():
    """Let garbage collections, and processes forked from this one, leave alone what is there."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    path = config.getoption("xmlpath", None)
    if path and not hasattr(config, "workerinput"):  # workers report to the process that writes
        config.pluginmanager.register(Rows(Path(path).with_suffix(".jsonl")))


class Rows:
    """Writes a line for each test as it ends; a file of results comes at the end of all."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            row = dict(test=report.nodeid, outcome=report.outcome, seconds=report.duration)
            row |= dict(report.user_properties)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def pytest_terminal_summary(terminalreporter):
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"not run here: {count} x {reason}")
