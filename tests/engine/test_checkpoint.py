"""Files that are whole or refused."""

import argparse
import hashlib
import json
import os
import pickle
import random
import resource
import signal
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from tests.damage import flipped, truncated, zeroed


@pytest.fixture
def state():
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 20)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": None,
        "epoch": 3,
        "history": [{"epoch": 3, "loss": 0.5, "tokens": [65, 53]}],
    }


@pytest.fixture
def file(tmp_path, state):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(path, state)
    return path


def test_what_is_loaded_is_what_was_saved(file, state):
    found = checkpoint.load(file)
    assert found.keys() == state.keys()
    assert torch.equal(found["model"]["weight"], state["model"]["weight"])
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert (found["epoch"], found["history"]) == (3, state["history"])


def test_plain_torch_reads_it(file, state):
    found = torch.load(file, weights_only=True)
    assert torch.equal(found["model"]["weight"], state["model"]["weight"])


def test_nothing_else_is_left_in_the_folder(file, state):
    checkpoint.save(file, state)
    assert list(file.parent.iterdir()) == [file]


def test_a_failed_save_leaves_the_file_before(file):
    before = file.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        checkpoint.save(file, {"model": lambda: None})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_copy_stays_when_the_source_is_saved_again(file, state, tmp_path):
    best = tmp_path / "best.pth"
    checkpoint.copy(file, best)
    checkpoint.save(file, {**state, "epoch": 4})
    assert (checkpoint.load(best)["epoch"], checkpoint.load(file)["epoch"]) == (3, 4)
    checkpoint.copy(file, best)
    assert checkpoint.load(best)["epoch"] == 4


@pytest.mark.parametrize("harm", [flipped, truncated, zeroed])
def test_every_damaged_file_is_refused_in_one_sentence(file, harm):
    raw, draw = file.read_bytes(), random.Random(1)
    for _ in range(100):
        file.write_bytes(harm(raw, draw))
        with pytest.raises(CheckpointError, match=r"^[^\n]*checkpoint\.pth is .*damaged[^\n]*$"):
            checkpoint.load(file)


def test_damage_at_either_end_is_refused(file):
    raw = file.read_bytes()
    for at in (*range(4), *range(len(raw) - 110, len(raw))):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(file)


def test_the_checkpoint_of_another_program_loads_with_its_arguments(tmp_path, state):
    path = tmp_path / "vim_t.pth"
    args = argparse.Namespace(model="vim", opt_betas=(0.9, 0.95), device="cuda", lr=1e-3)
    torch.save({**state, "scaler": "none", "args": args}, path)
    assert checkpoint.load(path)["args"] == args


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


class Hidden(Payload):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.target)!r})",)


@pytest.mark.parametrize("kind", [Payload, Hidden])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_nothing_in_a_malicious_file_is_run(tmp_path, kind, zipped, nested):
    path, target = tmp_path / "evil.pth", tmp_path / "ran"
    payload = kind(target)
    content = {"model": {}, "args": argparse.Namespace(x=[payload]) if nested else payload}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"holds Python code \(.*\), .* nothing was run"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"some text\n" * 9, bytes(5000)])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"notes\.txt is "):
        checkpoint.load(path)


def test_a_missing_file_and_a_bare_tensor_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected a file that exists"):
        checkpoint.load(tmp_path / "none.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="holds a Tensor, expected a dictionary of weights"):
        checkpoint.load(tmp_path / "tensor.pth")


def test_weights_alone_keep_their_values_and_strings(tmp_path, state):
    path = tmp_path / "model.safetensors"
    checkpoint.save_weights(path, state["model"], {"model": "vim_micro"})
    found = checkpoint.load(path)
    assert torch.equal(found["model"]["weight"], state["model"]["weight"])
    assert found["metadata"]["model"] == "vim_micro"
    raw = path.read_bytes()
    names = [raw.index(name) for name in (b"vim_micro", b"sha256", b"writer", b"fambav")]
    for at in (len(raw) - 1, len(raw) // 2, *names):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(CheckpointError, match="SHA-256 does not match"):
            checkpoint.load(path)


TENSORS = {
    "head.weight": torch.arange(6.0).reshape(2, 3),
    "tail.weight": -torch.arange(6.0).reshape(2, 3),
    "z.bias": torch.ones(0),
}


def with_header(path, change):
    """Change the header of a safetensors file, and leave the bytes of its tensors."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = change(json.loads(raw[8 : 8 + size])), raw[8 + size :]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(header, name, **changes):
    return {**header, name: {**header[name], **changes}}


def swapped(header):
    one, two = header["head.weight"], header["tail.weight"]
    return {**header, "head.weight": two, "tail.weight": one}


HEADERS = {
    "another dtype": lambda h: entry(h, "head.weight", dtype="I32"),
    "another shape": lambda h: entry(h, "head.weight", shape=[3, 2]),
    "one dimension less": lambda h: entry(h, "head.weight", shape=[6]),
    "two names swapped": swapped,
    "another name": lambda h: {name.replace("head", "heap"): own for name, own in h.items()},
    "an empty tensor dropped": lambda h: {name: h[name] for name in h if name != "z.bias"},
    "an empty tensor of another shape": lambda h: entry(h, "z.bias", shape=[0, 5]),
    "another rule": lambda h: entry(h, "__metadata__", digest="1"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_weights_whose_header_says_something_else_are_refused_in_one_line(tmp_path, case):
    path = tmp_path / "model.safetensors"
    checkpoint.save_weights(path, TENSORS, {"model": "vim_micro"})
    assert checkpoint.load(path)["metadata"]["digest"] == "2"
    with_header(path, HEADERS[case])
    with pytest.raises(CheckpointError, match=r"^[^\n]*model\.safetensors is damaged[^\n]*$"):
        checkpoint.load(path)


def test_a_dropped_tensor_is_refused_in_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_weights(path, TENSORS, {})
    metadata = checkpoint.load(path)["metadata"]
    save_file(TENSORS, path, metadata)
    assert checkpoint.load(path)["metadata"] == metadata
    save_file({name: TENSORS[name] for name in TENSORS if name != "tail.weight"}, path, metadata)
    with pytest.raises(CheckpointError, match=r"^[^\n]* SHA-256 does not match its content$"):
        checkpoint.load(path)


def test_a_file_of_the_old_rule_is_read_and_said_to_be_so(tmp_path):
    path, metadata = tmp_path / "old.safetensors", {"format": "pt", "writer": "fambav"}
    digest = hashlib.sha256(repr(sorted({**metadata, "sha256": ""}.items())).encode())
    for name in sorted(TENSORS):
        digest.update(name.encode() + TENSORS[name].numpy().tobytes())
    save_file(TENSORS, path, {**metadata, "sha256": digest.hexdigest()})
    with pytest.warns(UserWarning, match=r"^[^\n]*old\.safetensors has a digest of the old rule"):
        found = checkpoint.load(path)["model"]
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256 does not match"):
        checkpoint.load(path)


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_so_is_its_name(
    tmp_path, state, monkeypatch
):
    steps, sync, replace = [], os.fsync, Path.replace

    def fsync(handle):
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def move(self, target):
        steps.append("move")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", move)
    checkpoint.save(tmp_path / "checkpoint.pth", state)
    assert steps == ["file", "move", "folder"]


def test_a_file_may_be_read_by_whom_other_files_may(tmp_path, file):
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


@contextmanager
def small_files():
    """Let no file of this process grow over 5,000 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        yield
    finally:  # before the test is reported, which may write a large file
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_with_its_reason_and_loses_nothing(tmp_path):
    path, weights = tmp_path / "a.pth", tmp_path / "a.safetensors"
    checkpoint.save(path, {"epoch": 1})
    checkpoint.save_weights(weights, {"w": torch.ones(2)}, {})
    with small_files(), pytest.raises(OSError, match=r"File too large: '.*a\.pth'"):
        checkpoint.save(path, {"model": torch.ones(10_000)})
    with small_files(), pytest.raises(OSError, match=r"File too large: '.*a\.safetensors'"):
        checkpoint.save_weights(weights, {"w": torch.ones(10_000)}, {})
    assert checkpoint.load(path) == {"epoch": 1}
    assert len(checkpoint.load(weights)["model"]["w"]) == 2
    assert sorted(tmp_path.iterdir()) == [path, weights]
