"""Asked to stop, a run saves what it has come to, ends, and goes on to the same bits."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fambav.engine import checkpoint, trainer
from fambav.engine.run_dir import Recorder
from fambav.engine.step import TrainStep
from fambav.training import folder as run_folder
from fambav.training import pictured
from tests.identical import assert_identical
from tests.trust.forked import FRESH, run, run_two, start
from tests.trust.test_orphans import family

ROOT = Path(__file__).resolve().parents[2]
STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 0}
PATIENCE = 100  # seconds for what must happen at all


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
    "before the run folder is written": (run_folder, "open_folder", 1, 0),
    "in the first update": (TrainStep, "__call__", 1, 1),
    "in the middle of an epoch": (TrainStep, "__call__", 3, 3),
    "in the last update of an epoch": (TrainStep, "__call__", 4, 4),
    "in an evaluation": (trainer.Trainer, "_evaluate", 2, 4),
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


def in_group(pgid):
    """The processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == pgid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def assert_none_left(pgid):
    """See that the processes of a group end; end those that do not."""
    end = time.monotonic() + PATIENCE
    while in_group(pgid) and time.monotonic() < end:
        time.sleep(0.05)
    left = in_group(pgid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def to_all(which):
    """Send a signal to all processes of this one's group."""
    os.killpg(os.getpgid(0), which)


def kill_run():
    """Kill the process that started this one, and wait until it is gone."""
    run = os.getppid()
    os.kill(run, signal.SIGKILL)
    while os.getppid() == run:
        time.sleep(0.01)


def in_loader(number, ask, begun, note):
    """Let the `number`-th loader process call `ask`, at its birth or when torch has prepared it.

    The run is the first of a process group, whose number is written to the file `note`.
    """
    os.setsid()
    note.write_text(str(os.getpid()))
    born = []

    def child():
        if len(born) == number - 1:
            if begun:  # torch's handlers are there by then, and its threads
                real = torch.set_num_threads
                torch.set_num_threads = lambda count: (real(count), ask())
            else:
                ask()

    os.register_at_fork(after_in_child=child, after_in_parent=lambda: born.append(1))


@pytest.fixture(scope="module", params=[1, 2])
def loading(request, recipe, tmp_path_factory):
    """Words of a run with two loader processes and so many threads, and where it is done."""
    words = [*recipe, "--num_workers", "2", "--threads", request.param]
    folder = tmp_path_factory.mktemp("loading") / "run"
    found = run(words, folder, context=FRESH)
    assert found.status == 0, found.out
    return words, folder


def stopped_in_loader(words, folder, number, ask, begun=True):
    """Run until the `number`-th loader process asks; see that no process is left."""
    note = folder.with_suffix(".group")
    asked = partial(in_loader, number, ask, begun, note)
    stopped = run(words, folder, asked, context=FRESH)
    assert "Traceback" not in stopped.out
    assert "error: " not in stopped.out
    assert_none_left(int(note.read_text()))
    return stopped


@pytest.mark.parametrize("number", [1, 2, 3, 4])  # two that train, two that evaluate
def test_a_signal_to_all_processes_that_comes_as_a_loader_starts_saves(loading, tmp_path, number):
    (words, whole), folder = loading, tmp_path / "run"
    stopped = stopped_in_loader(words, folder, number, partial(to_all, signal.SIGTERM))
    assert stopped.status == 143, stopped.out
    assert f"SIGTERM: saved after update {0 if number < 3 else 2}" in stopped.out
    assert run([*words, "--resume", "auto"], folder, context=FRESH).status == 0
    assert_identical(folder, whole)


@pytest.mark.parametrize("number", [1, 4])
def test_an_interruption_as_a_loader_starts_says_what_is_left(loading, tmp_path, number):
    words, _ = loading
    stopped = stopped_in_loader(
        words, tmp_path / "run", number, partial(to_all, signal.SIGINT), begun=False
    )
    assert stopped.status == 130, stopped.out
    assert "nothing is saved of this run" in stopped.out
    assert stopped.out.endswith("interrupted\n")


@pytest.mark.parametrize("number", [1, 4])
def test_a_loader_whose_run_is_killed_as_it_starts_ends(loading, tmp_path, number):
    words, _ = loading
    stopped = stopped_in_loader(words, tmp_path / "run", number, kill_run)
    assert stopped.status == -signal.SIGKILL


MOMENTS_OF_ALL = [
    *(("Epoch: [0] [1/2]", delay) for delay in (0, 0.05, 0.1, 0.2, 0.3, 0.5)),
    *(("Epoch: [0] [2/2]", delay) for delay in (0, 0.1)),
]


@pytest.mark.parametrize(("line", "delay"), MOMENTS_OF_ALL)
def test_a_signal_to_all_processes_at_any_moment_saves(loading, tmp_path, line, delay):
    """The run is too long to be over before."""
    (words, _), folder = loading, tmp_path / "run"
    output = folder.with_suffix(".out")
    words = [*words, "--epochs", "10000", "--output_dir", folder]
    process = start(words, output, os.setsid, FRESH)
    end = time.monotonic() + PATIENCE
    while not (output.exists() and line in output.read_text()) and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert_none_left(process.pid)
    text = output.read_text()
    assert process.exitcode == 143, text
    assert "SIGTERM: saved after update" in text
    assert "Traceback" not in text
    assert "error: " not in text
    assert checkpoint.load(folder / "checkpoint.pth")["updates"] >= 1


def test_going_on_within_an_epoch_leaves_the_best_checkpoint_as_it_was(recipe, tmp_path):
    folder = tmp_path / "run"
    stopped = run(recipe, folder, asked_at(TrainStep, "__call__", 3, signal.SIGTERM))
    assert stopped.status == 143, stopped.out
    before = (folder / "best_checkpoint.pth").read_bytes()
    words = [*recipe, "--resume", "auto"]
    again = run(words, folder, asked_at(TrainStep, "__call__", 1, signal.SIGTERM))
    assert again.status == 143, again.out
    assert "saved after update 4" in again.out
    assert (folder / "best_checkpoint.pth").read_bytes() == before


def again_later(which):
    """Ask twice, as somebody does who does not want to wait."""
    signal.raise_signal(which)
    time.sleep(4)
    signal.raise_signal(which)


def test_a_second_signal_ends_at_once_and_loses_nothing(whole, recipe, tmp_path):
    folder = tmp_path / "run"
    twice = asked_at(TrainStep, "__call__", 4, signal.SIGTERM, ask=again_later)
    stopped = run(recipe, folder, twice)
    assert stopped.status == -signal.SIGTERM
    assert "saved" not in stopped.out
    assert run([*recipe, "--resume", "auto"], folder).status == 0
    assert_identical(folder, whole)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_comes_several_times_at_once_is_one_request(whole, recipe, tmp_path, which):
    """As from `timeout`, which sends it to its child and to the group of that."""
    folder = tmp_path / "run"
    stopped = run(recipe, folder, asked_at(TrainStep, "__call__", 4, which, times=3))
    assert stopped.status == STATUS[which], stopped.out
    assert f"{which.name}: saved after update 4" in stopped.out
    assert run([*recipe, "--resume", "auto"], folder).status == 0
    assert_identical(folder, whole)


LAST = {
    "while the last checkpoint is written": (checkpoint, "save", 3),
    "while the last log line is written": (Recorder, "epoch", 3),
    "while a picture is drawn at the end": (pictured, "tokens", 1),
}


@pytest.mark.parametrize("moment", LAST)
def test_a_signal_after_the_last_update_lets_the_run_end(whole, recipe, tmp_path, moment):
    folder = tmp_path / "run"
    found = run(recipe, folder, asked_at(*LAST[moment], signal.SIGTERM))
    assert found.status == 0, found.out
    assert_identical(folder, whole)


def test_signals_do_what_they_did_once_a_run_is_over():
    before = [signal.getsignal(number) for number in STATUS]
    from fambav.engine.preemption import Preemption

    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.signal == signal.SIGUSR1
    assert [signal.getsignal(number) for number in STATUS] == before


def to_launcher(pid):
    """Ask a launcher alone, which passes it on."""
    os.kill(pid, signal.SIGUSR1)
    return "SIGUSR1"


def to_whole_job(pid):
    """Ask the launcher and all processes below it, as a scheduler does."""
    for each in (*family(pid), pid):
        os.kill(each, signal.SIGTERM)
    return "SIGTERM"


LAUNCHER = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    *("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "main.py"),
)
LAUNCHED = dict(
    cwd=ROOT,
    env={**os.environ, "OMP_NUM_THREADS": "1"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
)


@pytest.fixture(scope="module")
def launched(recipe, tmp_path_factory):
    """The words of two processes, and the folder of their run that nothing interrupts."""
    # Long enough not to be over when the signal comes.
    words = [*map(str, recipe), "--batch-size", "4", "--epochs", "4", "--num_workers", "1"]
    folder = tmp_path_factory.mktemp("pair") / "whole"
    assert run_two(words, folder).status == [0, 0]
    return words, folder


@pytest.mark.slow
@pytest.mark.xdist_group("launched")
@pytest.mark.parametrize("ask", [to_launcher, to_whole_job])
def test_a_launcher_that_passes_a_signal_on_ends_two_processes_at_one_step(launched, tmp_path, ask):
    """The interrupted and continued run of two processes equals one that nothing interrupted."""
    (words, whole), folder = launched, tmp_path / "run"
    command = [*LAUNCHER, *words, "--output_dir", str(folder)]
    with subprocess.Popen(command, text=True, **LAUNCHED) as process:
        for line in process.stdout:
            if line.startswith("Epoch: [1]"):
                break
        name = ask(process.pid)
        rest = process.stdout.read()
    assert rest.count(f"{name}: saved after update") == 1, rest
    assert run_two([*words, "--resume", "auto"], folder).status == [0, 0]
    assert_identical(folder, whole)
