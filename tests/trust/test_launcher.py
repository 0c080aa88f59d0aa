"""What a launcher states in the environment: understood, or refused by every process in a line."""

import os
import socket

import pytest

from fambav import cli, launcher
from tests.trust.forked import run
from tests.trust.refusals import call, refused, the_line_of

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
    "WORLD_SIZE=2": "RANK",
    "WORLD_SIZE=-2": "WORLD_SIZE",
    "RANK=0 WORLD_SIZE=0": "WORLD_SIZE",
    "LOCAL_RANK=²": "LOCAL_RANK",
    "LOCAL_RANK=\udcff": "LOCAL_RANK",
}
HERE = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29400")
ADDRESSES = {
    "no address": (dict(MASTER_PORT="29400"), "MASTER_ADDR"),
    "no port": (dict(MASTER_ADDR="127.0.0.1"), "MASTER_PORT"),
    "an empty address": (dict(HERE, MASTER_ADDR=""), "MASTER_ADDR"),
    "a port that is text": (dict(HERE, MASTER_PORT="abc"), "MASTER_PORT"),
    "a port that is superscript": (dict(HERE, MASTER_PORT="²"), "MASTER_PORT"),
    "port 0": (dict(HERE, MASTER_PORT="0"), "MASTER_PORT"),
    "a port above all": (dict(HERE, MASTER_PORT="99999"), "MASTER_PORT"),
    "a port below all": (dict(HERE, MASTER_PORT="-1"), "MASTER_PORT"),
    "a port of 400 digits": (dict(HERE, MASTER_PORT=LONG), "MASTER_PORT"),
    "an address that is none": (dict(HERE, MASTER_ADDR="no host"), "MASTER_ADDR"),
    "a label that is too long": (dict(HERE, MASTER_ADDR="a" * 300), "MASTER_ADDR"),
}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *HERE)


def parsed(words):
    return dict(word.split("=") for word in words.split(" "))


@pytest.fixture
def launched(monkeypatch):
    """Let variables, and no others of a launcher, stand in the environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(*item) for item in values.items()]


@pytest.mark.parametrize("words", MALFORMED, ids=lambda words: ascii(words[:20]))
def test_a_place_that_cannot_be_is_refused(words):
    with pytest.raises(launcher.LauncherError, match=f"^{MALFORMED[words]} is ") as found:
        launcher.place(parsed(words))
    assert len(str(found.value)) < 120
    assert str(found.value).isprintable()


@pytest.mark.parametrize("case", ADDRESSES)
def test_an_address_that_cannot_be_is_refused(case):
    environment, name = ADDRESSES[case]
    with pytest.raises(launcher.LauncherError, match=f"^{name} is ") as found:
        launcher.rendezvous_address(environment)
    assert len(str(found.value)) < 160


def test_places_that_can_be_are_read():
    assert launcher.place({}) == (0, 1, 0)
    assert launcher.place(dict(RANK="0")) == launcher.place(dict(WORLD_SIZE="1")) == (0, 1, 0)
    assert launcher.place(dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")) == (5, 8, 1)
    assert launcher.rendezvous_address(HERE) == ("127.0.0.1", 29400)


@pytest.mark.parametrize("words", ["RANK=abc", "RANK=1", "RANK=5 WORLD_SIZE=2", "WORLD_SIZE=0"])
def test_main_refuses_a_place_before_it_prints_or_writes(recipe, tmp_path, launched, words):
    launched(**HERE, **parsed(words))
    refused(*recipe, "--output_dir", tmp_path / "run", names=[MALFORMED.get(words, words[:4])])
    assert call(*recipe, "--output_dir", tmp_path / "run").out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", "01")
def test_every_process_prints_what_is_wrong_with_its_address(recipe, tmp_path, rank):
    place = dict(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="", MASTER_PORT="29400")
    found = run(recipe, tmp_path / "run", lambda: os.environ.update(place), timeout=60)
    the_line_of(found, "MASTER_ADDR")
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_named(recipe, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = dict(HERE, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT=port)
        found = run(recipe, tmp_path / "run", lambda: os.environ.update(place), timeout=60)
    assert "expected a free port" in the_line_of(found, "MASTER_PORT", port)
    assert not (tmp_path / "run").exists()


def test_other_commands_refuse_a_place_or_need_none(tmp_path, launched):
    launched(RANK="abc")
    bench = "bench scan --batch 1 --length 4 --dim 4 --rounds 1 --device cpu"
    refused(*bench.split(), names=["RANK"], program=cli.console)
    refused("predict", tmp_path / "none", "x.png", names=["RANK"], program=cli.console)
    for command in ("plan", "flops"):
        found = call(command, "--model", "vim_micro", program=cli.console)
        assert (found.status, found.err) == (0, "")
        assert found.out


def test_a_flag_of_the_launcher_is_compared_with_what_it_states(recipe, tmp_path, launched):
    launched(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    more = ("--output_dir", tmp_path / "run")
    refused(*recipe, *more, "--local-rank", "1", names=["--local-rank is 1, expected 0"])
    launched(LOCAL_RANK="²")
    refused(*recipe, *more, "--local-rank", "1", names=["LOCAL_RANK is '²'"])
