"""Small grids on made-up images: written, carried out, started as a command, and watched."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import fambav
from fambav.experiments import read_grid, sweep
from tests.data.made import made_cifar

ROOT = Path(fambav.__file__).parents[1]
BASE = """model: vim_micro
input_size: 16
class_token: none
data_set: CIFAR
data_path: {folder}
num_workers: 0
batch_size: 8
epochs: {epochs}
warmup_epochs: 0
lr: 1.0e-3
unscale_lr: true
repeated_aug: false
model_ema: false
"""
UNREDUCED = """base: base.yaml
seeds: [0, 1]
finetune: {epochs: 2, lr: 5.0e-4}
rows:
  - name: ordered
    fusion_strategy: upper
    fusion_layer: 4
    fusion_token: 3
    fusion_method: ordered
"""
SCRATCH = """train: scratch
base: base.yaml
seeds: [0]
rows:
  - {name: none, fusion_strategy: none}
  - {name: upper, fusion_strategy: upper, fusion_layer: 4, fusion_token: 3}
"""


def written(folder, text, *changes, epochs=1):
    """Write a grid, some of its text replaced, with its base and its images; return its path."""
    if not (folder / "base.yaml").exists():
        made_cifar(folder, train=16, test=37, classes=3)
    (folder / "base.yaml").write_text(BASE.format(folder=folder, epochs=epochs))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "grid.yaml").write_text(text)
    return folder / "grid.yaml"


def go(path, folder, **given):
    """Carry out a grid; return its records, the cells that ran, and what was said."""
    said = []
    given = {"jobs": 1, "keep": False, **given}
    found = sweep.run(read_grid(path), folder, report=said.append, **given).records
    ran = [line.split("] ")[1].split(": ")[0] for line in said if line.startswith("[")]
    return SimpleNamespace(found=found, ran=ran, said=said, folder=folder)


def edit(path, change):
    """Change the JSON object of a file."""
    known = json.loads(path.read_text())
    change(known)
    path.write_text(json.dumps(known))


def accuracies(found):
    return {name: known["figures"].get("acc1") for name, known in found.items()}


def losses(folder):
    """The losses and accuracies of every epoch, by log."""
    return {
        str(log.relative_to(folder)): [
            json.loads(line)[name]
            for line in log.read_text().splitlines()
            for name in ("train_loss", "test_loss", "test_acc1")
        ]
        for log in folder.rglob("log.txt")
    }


def until(condition, *, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def start(path, folder, *, jobs=2):
    """Start `fambav table` on a grid in a process of its own."""
    words = ["table", "--grid", str(path), "--output_dir", str(folder), "--jobs", str(jobs)]
    return subprocess.Popen(
        [sys.executable, "-m", "fambav", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job passes on that it does not heed an interruption.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def descendants(pid):
    """Processes that a process has started, themselves or through others, still there."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def at_work(pid):
    """Processes of a grid, each with the folder of the cell it works at."""
    found = []
    for child in descendants(pid):
        for link in Path(f"/proc/{child}/fd").glob("*"):
            with suppress(OSError):  # closed, or ended, since it was listed
                if link.readlink().name == "output.txt":
                    found.append((child, link.readlink().parent))
    return found
