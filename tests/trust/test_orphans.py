"""Processes whose launcher was killed do not go on without it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 10  # seconds


def family(pid):
    """The processes below one, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            child = int(stat.parent.name)
            found += [child, *family(child)]
    return found


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_within_ten_seconds_of_their_killed_launcher(recipe, tmp_path):
    words = [*map(str, recipe), "--epochs", "1000", "--num_workers", "1", "--batch-size", "4"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with subprocess.Popen(
        [*launcher, "main.py", *words, "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("Epoch: [1]"):
                break
        workers = family(process.pid)
        assert len(workers) >= 4, "two ranks with a loader process each"
        process.send_signal(signal.SIGKILL)
        end = time.monotonic() + PATIENCE
        while any(map(lives, workers)) and time.monotonic() < end:
            time.sleep(0.1)
        left = [pid for pid in workers if lives(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == []
