"""Asked to stop, a run saves what it has come to, ends, and goes on to the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fambav.engine import checkpoint, fit, train
from tests.identical import assert_identical
from tests.trust.forked import run

ROOT = Path(__file__).resolve().parents[2]
STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 0}


def asked_at(owner, name, number, which, times=1, ask=signal.raise_signal):
    """Send this process a signal in the `number`-th call of a function, from 1."""

    def prepare():
        real, calls = getattr(owner, name), []

        def counted(*given, **named):
            calls.append(1)
            if len(calls) == number:
                for _ in range(times):
                    ask(which)
            return real(*given, **named)

        setattr(owner, name, counted)

    return prepare


MOMENTS = {
    "in the first update": (train.Update, "__call__", 1, 1),
    "in the middle of an epoch": (train.Update, "__call__", 3, 3),
    "in the last update of an epoch": (train.Update, "__call__", 4, 4),
    "in an evaluation": (fit.Fit, "_scores", 2, 4),
    "while a checkpoint is written": (checkpoint, "save", 1, 2),
}


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_to_the_same_bits(
    whole, recipe, tmp_path, moment, which
):
    folder = tmp_path / "run"
    *where, updates = MOMENTS[moment]
    stopped = run(recipe, folder, asked_at(*where, which))
    assert stopped.status == STATUS[which], stopped.out
    assert f"{which.name}: saved after update {updates}" in stopped.out
    assert "Traceback" not in stopped.out
    assert checkpoint.load(folder / "checkpoint.pth")["updates"] == updates
    found = run([*recipe, "--resume", "auto"], folder)
    assert found.status == 0, found.out
    assert f"after update {updates}" in found.out
    assert_identical(folder, whole)


def asked_together(which):
    """Let another process send all processes of this one's group a signal."""
    group, other = os.getpgid(0), os.fork()
    if other == 0:
        os.setsid()
        os.killpg(group, which)
        os._exit(0)
    os.waitpid(other, 0)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_job_leaves_the_loaders_to_the_run(
    whole, recipe, tmp_path, which
):
    folder, words = tmp_path / "run", [*recipe, "--num_workers", "2"]
    asked = asked_at(train.Update, "__call__", 3, which, ask=asked_together)

    def prepare():
        os.setsid()
        asked()

    stopped = run(words, folder, prepare)
    assert stopped.status == STATUS[which], stopped.out
    assert f"{which.name}: saved after update 3" in stopped.out
    assert "Traceback" not in stopped.out
    assert "error: " not in stopped.out
    assert run([*words, "--resume", "auto"], folder).status == 0
    assert_identical(folder, whole)


def test_going_on_within_an_epoch_leaves_the_best_checkpoint_as_it_was(recipe, tmp_path):
    folder = tmp_path / "run"
    stopped = run(recipe, folder, asked_at(train.Update, "__call__", 3, signal.SIGTERM))
    assert stopped.status == 143, stopped.out
    before = (folder / "best_checkpoint.pth").read_bytes()
    words = [*recipe, "--resume", "auto"]
    again = run(words, folder, asked_at(train.Update, "__call__", 1, signal.SIGTERM))
    assert again.status == 143, again.out
    assert "saved after update 4" in again.out
    assert (folder / "best_checkpoint.pth").read_bytes() == before


def test_a_second_signal_ends_at_once_and_loses_nothing(whole, recipe, tmp_path):
    folder = tmp_path / "run"
    twice = asked_at(train.Update, "__call__", 4, signal.SIGTERM, times=2)
    stopped = run(recipe, folder, twice)
    assert stopped.status == -signal.SIGTERM
    assert "saved" not in stopped.out
    assert run([*recipe, "--resume", "auto"], folder).status == 0
    assert_identical(folder, whole)


def test_signals_do_what_they_did_once_a_run_is_over():
    before = [signal.getsignal(number) for number in STATUS]
    from fambav.engine.control import Signals

    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.number == signal.SIGUSR1
    assert [signal.getsignal(number) for number in STATUS] == before


@pytest.mark.slow
def test_a_launcher_that_passes_a_signal_on_ends_two_processes_at_one_step(recipe, tmp_path):
    """The interrupted and continued run of two processes equals one that nothing interrupted."""
    # Long enough not to be over when the signal comes.
    words = [*map(str, recipe), "--batch-size", "4", "--epochs", "6"]
    folders = [tmp_path / "whole", tmp_path / "run"]
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "main.py", *words),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    given = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    subprocess.run([*launcher, "--output_dir", str(folders[0])], check=True, **given)
    words = [*launcher, "--output_dir", str(folders[1])]
    with subprocess.Popen(words, text=True, **given) as process:
        for line in process.stdout:
            if line.startswith("Epoch: [1]"):
                break
        process.send_signal(signal.SIGUSR1)
        rest = process.stdout.read()
    assert rest.count("SIGUSR1: saved after update") == 1, rest
    resumed = [*launcher, "--output_dir", str(folders[1]), "--resume", "auto"]
    subprocess.run(resumed, check=True, **given)
    assert_identical(folders[1], folders[0])
