"""What a launcher says in the environment: understood, or refused by every process in a line."""

import os
import socket

import pytest

from fambav import cli
from tests.trust.forked import run, run_alone
from tests.trust.refusals import the_line_of

HERE = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
LONG = "1" * 400
# Variables, and what the line has to name.
MALFORMED = {
    "RANK=abc": "RANK",
    "RANK=-1": "RANK",
    "RANK=²": "RANK",
    "RANK=1.0": "RANK",
    f"RANK={LONG}": "RANK",
    "RANK= WORLD_SIZE=2": "RANK",
    "RANK=1": "WORLD_SIZE",
    "RANK=3 WORLD_SIZE=1": "RANK",
    "RANK=2 WORLD_SIZE=2": "RANK",
    "RANK=5 WORLD_SIZE=2": "RANK",
    "WORLD_SIZE=2": "RANK",
    "WORLD_SIZE=0": "WORLD_SIZE",
    "WORLD_SIZE=-2": "WORLD_SIZE",
    "WORLD_SIZE=abc": "WORLD_SIZE",
    "WORLD_SIZE=²": "WORLD_SIZE",
    "WORLD_SIZE=1e1": "WORLD_SIZE",
    f"WORLD_SIZE={LONG}": "WORLD_SIZE",
    "RANK=0 WORLD_SIZE=0": "WORLD_SIZE",
    "LOCAL_RANK=abc": "LOCAL_RANK",
    "LOCAL_RANK=-1": "LOCAL_RANK",
    "LOCAL_RANK=²": "LOCAL_RANK",
}
MEETING = {
    "no address": (dict(MASTER_PORT="29400"), "MASTER_ADDR"),
    "no port": (dict(MASTER_ADDR="127.0.0.1"), "MASTER_PORT"),
    "an empty address": (dict(MASTER_ADDR="", MASTER_PORT="29400"), "MASTER_ADDR"),
    "a port that is text": (dict(HERE, MASTER_PORT="abc"), "MASTER_PORT"),
    "a port that is superscript": (dict(HERE, MASTER_PORT="²"), "MASTER_PORT"),
    "a port above all": (dict(HERE, MASTER_PORT="99999"), "MASTER_PORT"),
    "a port below all": (dict(HERE, MASTER_PORT="-1"), "MASTER_PORT"),
    "a port of 400 digits": (dict(HERE, MASTER_PORT=LONG), "MASTER_PORT"),
    "an address that is none": (dict(HERE, MASTER_ADDR="no host", MASTER_PORT="1"), "MASTER_ADDR"),
}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *HERE)


def launched(**said):
    """Let these variables, and no others of a launcher, stand in the environment."""

    def prepare():
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(said)

    return prepare


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def parsed(words):
    return dict(word.split("=") for word in words.split(" "))


@pytest.mark.parametrize("words", MALFORMED, ids=lambda words: words[:20])
def test_a_place_that_cannot_be_is_refused(recipe, tmp_path, words):
    said = dict(HERE, MASTER_PORT=str(free_port()), **parsed(words))
    found = run(recipe, tmp_path / "run", launched(**said), timeout=6)
    the_line_of(found, MALFORMED[words])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", MEETING)
def test_a_place_to_meet_that_cannot_be_is_refused(recipe, tmp_path, case):
    said, name = MEETING[case]
    prepare = launched(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **said)
    the_line_of(run(recipe, tmp_path / "run", prepare, timeout=6), name)
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_named(recipe, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = dict(HERE, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT=port)
        found = run(recipe, tmp_path / "run", launched(**said), timeout=10)
    the_line_of(found, "MASTER_PORT", port)
    assert not (tmp_path / "run").exists()


OTHERS = {
    "plan": ["plan", "--model", "vim_micro"],
    "flops": ["flops", "--model", "vim_micro"],
    "bench": ["bench", "scan", "--batch", "1", "--lengths", "4", "--dim", "4", "--rounds", "1"],
}


@pytest.mark.parametrize("command", [*OTHERS, "predict"])
def test_other_commands_refuse_it_or_go_without(whole, tmp_path, command):
    words = OTHERS.get(command, ["predict", whole, tmp_path / "none.png"])
    prepare = launched(RANK="abc")
    found = run_alone(words, tmp_path / "out", prepare, program=cli.console)
    if found.status:
        the_line_of(found, "none.png" if command == "predict" else "RANK")
    else:
        assert command in ("plan", "flops")
