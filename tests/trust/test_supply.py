"""Nothing is fetched, told to anyone or logged that was not asked for."""

import json
import os
import sys

from tests.trust.forked import run

SECRET = "correct-horse-battery-staple"
REACHING = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")


def reaches_out(event, given):
    if event in REACHING:
        print("reached out:", event, given, flush=True)
        os._exit(99)


def watched():
    os.environ["HF_TOKEN"] = os.environ["AWS_SECRET_ACCESS_KEY"] = SECRET
    sys.addaudithook(reaches_out)


def test_a_run_reaches_no_network_and_writes_down_no_secret(recipe, tmp_path):
    folder = tmp_path / "run"
    found = run([*recipe, "--epochs", "1"], folder, watched)
    assert found.status == 0, found.out
    told = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"vim_micro" in told
    assert SECRET.encode() not in told
    assert SECRET not in found.out


def test_the_network_is_reached_only_when_a_flag_asks_for_it(recipe, tmp_path):
    words = [*recipe, "--epochs", "1", "--data-path", tmp_path / "empty"]
    found = run(words, tmp_path / "run", watched)
    assert found.status == 2, found.out
    assert "--download" in found.out
    found = run([*words, "--download"], tmp_path / "run", watched)
    assert found.status == 99
    assert "reached out: " in found.out


def test_what_is_written_of_the_machine_is_a_list_of_known_things(whole):
    known = {
        *("command", "python", "platform", "packages", "fambav", "commit", "cpu", "cpu_count"),
        *("threads", "gpu", "cuda", "started", "processes", "device", "precision", "data"),
        *("resumed", "unfused"),
    }
    told = json.loads((whole / "env.json").read_text())
    assert told.keys() == known
    for name, value in os.environ.items():
        if len(value) > 12 and not any(value in word for word in told["command"]):
            assert value not in json.dumps(told), name
