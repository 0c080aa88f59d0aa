"""Runs of main.py in processes of their own that need no second to start.

A fork has everything imported already; torch is told to use one thread, so none is lost in it, but
where the process that is forked has never had more.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from fambav import cli
from fambav.engine.step import TrainStep

FORK = multiprocessing.get_context("fork")
FRESH = multiprocessing.get_context("forkserver")  # forks a process that has never had threads
RUN_IMPORTS = ("fambav.training", "fambav.viz", "torch.utils.tensorboard", "fambav.ops.numba")
FRESH.set_forkserver_preload(["tests.trust.forked", *RUN_IMPORTS])
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # there, as the command does, before torch loads
RECIPE = """--model vim_micro --input-size 16 --data-set CIFAR --num_workers 0 --batch-size 8
    --grad-accum-steps 2 --epochs 3 --warmup-epochs 1 --lr 1e-3 --unscale-lr --clip-grad 1
    --drop-path 0.3 --log_every 1 --threads 1 --device cpu
    --fusion-strategy upper --fusion-layer 4 --fusion-token 3"""


def _body(words, output, prepare, fresh, program):
    if not fresh:
        torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may ignore it
    with Path(output).open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file  # whatever pytest has put there
        faulthandler.dump_traceback_later(100, file=file)  # of a run that hangs
        if prepare is not None:
            prepare()
        with contextlib.suppress(SystemExit):
            os._exit(program([str(word) for word in words]))


def start(words, output, prepare=None, context=FORK, program=cli.main):
    """Start main.py with `words`; `prepare` is called in the new process first."""
    given = (words, output, prepare, context is FRESH, program)
    process = context.Process(target=_body, args=given)
    process.start()
    return process


def run(words, folder, prepare=None, timeout=120, context=FORK):
    """Run main.py to its end; return its status and what it printed."""
    output = Path(folder).with_suffix(".out")
    before = output.stat().st_size if output.exists() else 0
    process = start([*words, "--output_dir", folder], output, prepare, context)
    return _ended(process, output, before, timeout)


def run_alone(words, output, prepare=None, timeout=60, program=cli.main):
    """Run a program with no more than `words` to its end, as `run` does."""
    return _ended(start(words, output, prepare, program=program), output, 0, timeout)


def _ended(process, output, before, timeout):
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"still running after {timeout} s: {output.read_text()}")
    return SimpleNamespace(status=process.exitcode, out=output.read_text()[before:])


def python(words):
    """Do what Python does with the words of a command line; return the status."""
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def run_two(words, folder, prepare=lambda rank: None, timeout=120, program=cli.main):
    """Run main.py, or another program, as two processes that a launcher starts together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def place(rank):
        def placed():
            found = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank)
            os.environ.update({name: str(value) for name, value in found.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            prepare(rank)

        return placed

    outputs = [Path(folder).with_suffix(f".{rank}.out") for rank in range(2)]
    words = [*words, "--output_dir", folder] if program is cli.main else words
    started = [start(words, outputs[rank], place(rank), program=program) for rank in range(2)]
    for process in started:
        process.join(timeout)
    for process in started:
        process.kill()
        process.join()
    texts = [output.read_text() for output in outputs]
    return SimpleNamespace(status=[p.exitcode for p in started], out=texts[0], other=texts[1])


def dies():
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_update():
    """Let the fourth update be the last thing that this process does."""
    real, calls = TrainStep.__call__, []

    def counted(*given):
        calls.append(1)
        if len(calls) == 4:
            dies()
        return real(*given)

    TrainStep.__call__ = counted
