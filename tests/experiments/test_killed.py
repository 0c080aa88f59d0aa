"""Grids that are interrupted or killed, and processes of cells that die."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fambav.engine.lock import locked
from tests.experiments.made import (
    ROOT,
    SCRATCH,
    UNREDUCED,
    accuracies,
    at_work,
    descendants,
    go,
    losses,
    start,
    until,
    written,
)

CELLS = 8  # two unreduced models; each then tuned, with fusion, and tuned with fusion
SLOW = pytest.mark.timeout(900)  # each starts a dozen processes
PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A grid that nothing stops."""
    place = tmp_path_factory.mktemp("whole")
    return go(written(place, UNREDUCED), place / "out", jobs=2)


@pytest.mark.slow
@SLOW
@PROC
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_grid_leaves_no_process_and_goes_on(whole, tmp_path, blow):
    path, folder = written(tmp_path, UNREDUCED), tmp_path / "out"
    process = start(path, folder)
    until(lambda: len(list(folder.rglob("result.json"))) >= 3)
    until(lambda: at_work(process.pid))
    workers = descendants(process.pid)
    process.send_signal(blow)
    _, err = process.communicate(timeout=60)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert process.returncode == (130 if blow == signal.SIGINT else -signal.SIGKILL)
    assert err == ("interrupted\n" if blow == signal.SIGINT else "")
    before = {p: p.read_bytes() for p in folder.rglob("result.json")}
    assert 3 <= len(before) < CELLS
    found = go(path, folder, jobs=2)
    assert len(found.ran) == CELLS - len(before)
    assert all(p.read_bytes() == content for p, content in before.items())
    assert accuracies(found.found) == pytest.approx(accuracies(whole.found))


@pytest.mark.slow
@SLOW
@PROC
def test_processes_of_a_killed_grid_do_not_finish_their_cells(tmp_path):
    folder = tmp_path / "out"
    process = start(written(tmp_path, UNREDUCED, epochs=100000), folder)
    until(lambda: len(list(folder.rglob("log.txt"))) == 2)
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), seconds=20)


@pytest.mark.slow
@SLOW
@PROC
def test_a_process_that_dies_fails_its_cell_alone(tmp_path):
    folder = tmp_path / "out"
    process = start(written(tmp_path, UNREDUCED), folder)
    until(lambda: at_work(process.pid))
    (pid, begun), *_ = at_work(process.pid)
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    record = json.loads((begun / "result.json").read_text())
    assert record["error"].startswith("process ended with status -9, expected a result")
    seed = record["seed"]
    assert err.startswith(
        f"error: {CELLS // 2} of {CELLS} cells failed: unreduced, seed {seed}, unreduced"
    )


@pytest.mark.slow
@SLOW
def test_a_grid_that_is_killed_in_the_middle_of_a_cell_goes_on_with_the_same_numbers(tmp_path):
    path = written(tmp_path, SCRATCH, epochs=8)
    whole = go(path, tmp_path / "whole")
    folder = tmp_path / "killed"
    process = start(path, folder, jobs=1)
    begun = folder / "cells/upper/seed0/scratch"
    until(lambda: (begun / "log.txt").exists() and (begun / "log.txt").read_text().count("\n") > 2)
    process.kill()
    process.communicate(timeout=60)
    assert not (begun / "result.json").exists()
    left = (begun / "log.txt").read_text().count("\n")
    assert 2 < left < 8
    again = go(path, folder)
    assert again.ran == ["upper, seed 0, scratch"]
    assert again.found[again.ran[0]]["resumed"]
    assert "going on from" in (begun / "output.txt").read_text()
    ours, theirs = losses(folder), losses(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-5), name
    for name, known in whole.found.items():
        for figure in ("acc1", "memory_mib"):
            assert again.found[name]["figures"][figure] == known["figures"][figure]


def test_a_folder_is_worked_in_by_one_process_at_a_time(tmp_path):
    path, folder = written(tmp_path, SCRATCH), tmp_path / "out"
    held = "from fambav.engine.lock import locked\nfrom pathlib import Path\nimport sys\n"
    held += (
        f"with locked(Path({str(folder)!r})):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", held], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"in\n"
        (folder / ".tmp-1").touch()  # of the other, which may be writing it
        message = f"expected a folder that no other run writes to; process {other.pid} on"
        with pytest.raises(ValueError, match=message):
            go(path, folder)
        assert not (folder / "results.csv").exists()
        assert (folder / ".tmp-1").exists()
    finally:
        other.kill()
        other.communicate(timeout=60)
    with locked(folder):
        pass
