"""What many tests need: programs called here, runs that are killed, checkpoints of small models."""

import contextlib
import io
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fambav import cli, training
from fambav.config import Config
from fambav.data import load
from fambav.engine import checkpoint
from fambav.engine.step import TrainStep
from fambav.seeding import seed_all
from fambav.training import run_state

SMALL = dict(model="vim_micro", data_set="DIGITS", data_stats="own", patch_size=8, num_workers=0)


def run(path, change=None, **settings):
    """Write a checkpoint; `change` may spoil its state first.

    A setting that is None has its default.
    """
    given = {name: v for name, v in {**SMALL, **settings}.items() if v is not None}
    found = load("DIGITS")
    config = Config.from_flat({"input_size": 32, "num_classes": found.num_classes, **given})
    seed_all(0)
    net = training.model(config, num_classes=found.num_classes)
    weights = net.state_dict()
    heads = ("head.weight", "head.fc.weight", "classifier.head.weight")
    head = next(name for name in heads if name in weights)
    weights[head] *= 50  # so that models differ in what they say
    state = {"model": weights, **run_state.facts(config, found, None, images=64)}
    if change is not None:
        change(state)
    checkpoint.save(path, state)
    return path


def go(*words, program=cli.main, encoding="utf-8"):
    """Call a program in this process, with streams as a terminal of that encoding has them."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        status = program([str(word) for word in words])
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return SimpleNamespace(status=status, out=out, err=err)


def refused(*words, program=cli.main):
    """Call a program, see that it refuses in one line, and return that line."""
    found = go(*words, program=program)
    assert found.status == 2, found.out + found.err
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    return found.err


class Crash(BaseException):
    """Stands for a kill signal: nothing may catch it."""


def crash_in_update(patch, update=3):
    """Let runs end in an update, as if they were killed."""
    real = TrainStep.__call__

    def call(self, batches, number):
        if number == update:
            raise Crash
        return real(self, batches, number)

    patch.setattr(TrainStep, "__call__", call)


@contextmanager
def crashing(crash=crash_in_update):
    """Let a run inside end as if it were killed; `crash` patches what is to raise `Crash`."""
    with pytest.MonkeyPatch.context() as patch:
        crash(patch)
        with pytest.raises(Crash):
            yield


def scores(*words):
    """The line of scores of an evaluation, and what it notes before."""
    found = go(*words, "--eval", "--num_workers", "0", "--threads", "1")
    assert found.status == 0, found.err
    lines = found.out.splitlines()
    told = next(line for line in lines if line.startswith("* Acc@1 "))
    return told, [line for line in lines if line.startswith("note: ")]


def spoiled(name, value):
    """Put a value into the first place of a weight."""

    def change(state):
        state["model"][name].view(-1)[0] = value

    return change


def converted(name, dtype):
    """Give a weight another dtype."""

    def change(state):
        state["model"][name] = state["model"][name].to(dtype)

    return change


def filled(name, value):
    """Fill a weight."""

    def change(state):
        state["model"][name] = torch.full_like(state["model"][name], value)

    return change
