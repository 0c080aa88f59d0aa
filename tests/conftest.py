"""One thread, NaN in memory that nobody wrote, and a count of what a machine cannot run."""

from collections import Counter

import pytest
import torch

import fambav.ecosystem  # noqa: F401  before any test imports timm or torchvision

torch.set_num_threads(1)

CANNOT_RUN = {"gpu": lambda: None if torch.cuda.is_available() else "needs a CUDA device"}


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)  # also makes torch.empty return NaN
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    for item in items:
        for mark, refuses in CANNOT_RUN.items():
            if item.get_closest_marker(mark) and (reason := refuses()):
                item.add_marker(pytest.mark.skip(reason=f"{mark}: {reason}"))


def pytest_terminal_summary(terminalreporter):
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"not run here: {count} x {reason}")
