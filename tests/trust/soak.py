"""The promises of reliability at full length; see scripts/soak.sh.

Every run is a process of its own, started as a user starts it.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from fambav.engine.run_dir import environment
from tests.data.made import made_cifar
from tests.identical import assert_identical, log
from tests.trust.forked import RECIPE
from tests.trust.test_orphans import family

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
PAIR = [*TORCHRUN, "--nproc_per_node=2"]
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
KILLS = {"one process": 50, "two processes": 25}
READY = "run folder: "  # main.py's last line before it trains
DONE = "Training time"  # and its last one


def begin(launcher, words, folder):
    """Start main.py; its lines go into a file beside the folder."""
    command = [sys.executable, *launcher, "main.py", *map(str, words), "--output_dir", str(folder)]
    with Path(folder).with_suffix(".out").open("a") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True
        )


def end(process):
    """Kill a process and all below it, as a power cut would."""
    for pid in (process.pid, *family(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def finish(launcher, words, folder):
    """Run main.py to its end, and return how long it trained."""
    output, process = Path(folder).with_suffix(".out"), begin(launcher, words, folder)
    start = trains(process, folder)
    while process.poll() is None and DONE not in output.read_text():
        time.sleep(0.005)
    seconds = time.monotonic() - start
    assert process.wait(600) == 0, output
    return seconds


def trains(process, folder):
    """Wait until a run has its folder and is about to train; return when that was."""
    output = Path(folder).with_suffix(".out")
    told = output.read_text().count(READY)  # of the run before in the same folder
    while process.poll() is None and output.read_text().count(READY) == told:
        time.sleep(0.005)
    return time.monotonic()


def kills(launcher, words, folder, count):
    """Kill `count` runs, each at a random moment, resume them, and compare what they come to."""
    draw, killed, late, whole = random.Random(11), 0, 0, folder / "whole"
    seconds = finish(launcher, words, whole)
    while killed < count:
        target = folder / f"run{killed + late}"
        process = begin(launcher, [*words, "--save-every", "2"], target)
        trains(process, target)
        time.sleep(draw.uniform(0, seconds))
        if process.poll() is not None:  # it was over already
            late += 1
            continue
        end(process)
        killed += 1
        finish(launcher, [*words, "--save-every", "2", "--resume", "auto"], target)
        assert_identical(target, whole)
    return {"killed": killed, "resumed to the same bits": killed}


def signals(launcher, words, folder, count):
    """Interrupt runs at random moments, and resume them."""
    draw, saved, beside, whole = random.Random(12), 0, 0, folder / "whole"
    seconds = finish(launcher, words, whole)
    while saved < count:
        number = saved + beside
        target = folder / f"run{number}"
        process = begin(launcher, words, target)
        trains(process, target)
        time.sleep(draw.uniform(0, seconds))
        process.send_signal((signal.SIGTERM, signal.SIGUSR1)[number % 2])
        start = time.monotonic()
        process.wait(60)
        assert time.monotonic() - start < 30, "a stop takes half a minute at most"
        output = target.with_suffix(".out").read_text()
        if "saved after update" not in output:
            assert DONE in output or "Epoch" not in output, "what was done is saved"
            beside += 1
            assert beside < 2 * count
            continue
        saved += 1
        finish(launcher, [*words, "--resume", "auto"], target)
        assert_identical(target, whole)
    return {"saved after a signal": saved, "resumed to the same bits": saved}


def locks(words, folder, count):
    """Start two jobs in one folder at once."""
    refused = 0
    for number in range(count):
        target = folder / f"run{number}"
        jobs = [begin([], [*words, "--epochs", "1"], target) for _ in range(2)]
        statuses = sorted(job.wait(300) for job in jobs)
        assert statuses == [0, 2], target.with_suffix(".out")
        refused += 1
    return {"starts": count, "one ran and one was refused": refused}


def elastic(words, folder, two):
    """Kill a rank of two; the launcher starts both again, and they end as what `two` runs."""
    whole, target = folder / "whole", folder / "run"
    words = [*words, "--epochs", "6"]  # so that it is not over when the rank is found
    two(words, whole)
    process = begin(
        [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=3"],
        [*words, "--resume", "auto", "--save-every", "1"],
        target,
    )
    output = target.with_suffix(".out")
    while process.poll() is None and "Epoch: [1]" not in output.read_text():
        time.sleep(0.005)
    ranks = [pid for pid in family(process.pid) if b"main.py" in command(pid)]
    os.kill(ranks[-1], signal.SIGKILL)
    try:
        assert process.wait(200) == 0, output
    finally:
        if process.poll() is None:
            end(process)
    assert_identical(target, whole)
    return {"ranks killed": 1, "identical": 1}


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def numerics(folder):
    """Train a thousand updates in each precision on digits."""
    found = {}
    for precision in ("--no_amp", "--if_amp"):
        target = folder / precision.strip("-")
        words = ["--config", "configs/digits/vim_micro_upper.yaml", "--epochs", "12", precision]
        finish([], [*words, "--log-activations"], target)
        lines = log(target)
        assert all(math.isfinite(line["train_loss"]) for line in lines)
        found[precision] = {
            "updates": 89 * len(lines),
            "skipped": sum(line["skipped_updates"] for line in lines),
            "largest activation": max(max(line["activation_max"]) for line in lines),
        }
    return found


def main(folder):
    """Keep all promises, and write what came of it after each."""
    folder.mkdir(parents=True)
    made_cifar(folder / "data", train=40, test=37)
    words = [*RECIPE.split(), "--data-path", folder / "data"]
    pair = [*words, "--batch-size", "4"]
    told = {"environment": environment()}
    for name, keep in {
        "signals, one process": lambda at: signals([], words, at, 20),
        "signals, two processes": lambda at: signals([*PAIR, HANDLED], pair, at, 20),
        "two jobs in one folder": lambda at: locks(words, at, 20),
        "a rank killed, launcher restarts": lambda at: elastic(pair, at, partial(finish, PAIR)),
        "a thousand updates": numerics,
        "killed, one process": lambda at: kills([], words, at, KILLS["one process"]),
        "killed, two processes": lambda at: kills(PAIR, pair, at, KILLS["two processes"]),
    }.items():
        start, place = time.monotonic(), folder / name.replace(", ", "-").replace(" ", "_")
        place.mkdir()
        told[name] = {**keep(place), "seconds": round(time.monotonic() - start)}
        print(f"{name}: {told[name]}", flush=True)
        (folder / "soak.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
