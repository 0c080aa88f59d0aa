"""Checkpoints of small untrained models of digits, as runs leave them."""

import contextlib
import io
from types import SimpleNamespace

import torch

from fambav import cli, training
from fambav.config import Config
from fambav.data import load
from fambav.engine import checkpoint
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
    head = next(name for name in ("head.weight", "head.fc.weight") if name in weights)
    weights[head] *= 50  # so that models differ in what they say
    state = {"model": weights, **run_state.facts(config, found, None, images=64)}
    if change is not None:
        change(state)
    checkpoint.save(path, state)
    return path


def go(*words, program=cli.main):
    """Call a program in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = program([str(word) for word in words])
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


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
