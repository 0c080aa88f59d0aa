"""Entries of a checkpoint that do not fit together, and pickles that no data needs."""

import pickle
import struct
import zipfile

import pytest
import torch
from PIL import Image

import fambav
from fambav import cli
from fambav.engine.checkpoint import CheckpointError
from tests import made
from tests.data.made import made_cifar
from tests.trust.forked import run, run_alone
from tests.trust.refusals import call, refused, the_line_of


def put(name, value):
    def change(state):
        state[name] = value

    return change


def weight(name, value):
    def change(state):
        state["model"][name] = value

    return change


NAMES = [f"digit {n}" for n in range(10)]
STATES = {
    "names of fewer classes": put("class_names", NAMES[:3]),
    "names of more classes": put("class_names", [*NAMES, "eleven"]),
    "no names at all": put("class_names", []),
    "a scalar head": weight("head.weight", torch.tensor(1.0)),
    "a head of one row": weight("head.weight", torch.ones(128)),
    "a head without classes": weight("head.weight", torch.ones(0, 128)),
    "a head of whole numbers": weight("head.weight", torch.ones(10, 128, dtype=torch.int64)),
    "a head of complex numbers": weight("head.weight", torch.ones(10, 128, dtype=torch.complex64)),
    "a sparse head": weight("head.weight", torch.ones(10, 128).to_sparse()),
    "a head on no device": weight("head.weight", torch.ones(10, 128, device="meta")),
    "a scalar position": weight("pos_embed", torch.tensor(1.0)),
    "a position without rows": weight("pos_embed", torch.ones(1, 0, 128)),
    "another number of classes": put("num_classes", 3),
    "a grid of no patches": put("grid", [10**6, 10**6]),
}


@pytest.mark.parametrize("case", STATES)
def test_entries_that_do_not_fit_are_refused(tmp_path, case):
    path = made.run(tmp_path / "checkpoint.pth", change=STATES[case])
    with pytest.raises(CheckpointError, match=r"^[^\n]+$") as refusal:
        fambav.from_pretrained(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("case", ["names of fewer classes", "a scalar head", "a sparse head"])
def test_commands_name_the_file_whose_entries_do_not_fit(tmp_path, case):
    path = made.run(tmp_path / "checkpoint.pth", change=STATES[case])
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    refused("predict", path, tmp_path / "a.png", names=[path], program=cli.console)
    refused("--eval", "--resume", path, "--threads", "1", names=[path])
    assert sorted(at.name for at in tmp_path.iterdir()) == ["a.png", "checkpoint.pth"]


SHOWN = {
    "surrogates": "a\ud800b",
    "escapes": "a\x1b[31mb",
    "lines": "a\nb",
    "a bell": "a\ab",
    "another direction": "a\u202eb",
    "zeros": "a\0b",
}


@pytest.mark.parametrize("case", SHOWN)
def test_a_name_of_a_class_does_nothing_to_a_terminal(tmp_path, case):
    path = made.run(tmp_path / "checkpoint.pth", change=put("class_names", [SHOWN[case]] * 10))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    found = call("predict", path, tmp_path / "a.png", program=cli.console)
    assert found.status == 0, found.err
    assert len(found.out.splitlines()) == 6
    assert not set(found.out) & set("\x1b\a\0\u202e")
    assert all("a" in line and "b" in line for line in found.out.splitlines()[1:])


def cyclic(state):
    state["config"]["model"] = state["config"]


def cyclic_alone(state):
    state["config"] = {"model": "vim_micro"}
    state["config"]["epochs"] = [state["config"]]


@pytest.mark.parametrize("change", [cyclic, cyclic_alone])
def test_settings_that_hold_themselves_are_refused(tmp_path, change):
    path = made.run(tmp_path / "checkpoint.pth", change=change)
    with pytest.raises(CheckpointError, match=r"^[^\n]{1,400}$"):
        fambav.from_pretrained(path)


def nested(kind, depth):
    """The pickle of a dictionary whose key, or whose value, is nested so deeply."""
    if kind == "keys":
        inner = b")" + b"\x85" * depth + b"K\x01"
    elif kind == "values":
        inner = b"K\x01)" + b"\x85" * depth
    else:
        inner = b"K\x01" + b"]" * depth + b"a" * (depth - 1)
    return b"\x80\x02}" + inner + b"s."


def as_checkpoint(path, raw):
    """An archive as torch writes it, around another pickle."""
    torch.save({"model": {}}, path)
    with zipfile.ZipFile(path) as old:
        kept = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, content in kept.items():
            new.writestr(name, raw if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize("kind", ["keys", "values", "lists"])
def test_a_checkpoint_nested_deeply_is_refused(recipe, tmp_path, kind):
    """In a process of its own, which a deep key once ended by a segmentation fault."""
    path = as_checkpoint(tmp_path / "deep.pth", nested(kind, 200_000))
    found = run([*recipe, "--resume", path], tmp_path / "run", timeout=30)
    the_line_of(found, path, "nested more than 100 deep")
    assert not (tmp_path / "run").exists()


def test_an_old_checkpoint_nested_deeply_is_refused(tmp_path):
    """A file of torch before 1.6 is one pickle after another."""
    path = tmp_path / "deep.pth"
    magic, protocol = 0x1950A86A20F9469CFC6C, 1001
    system = dict(protocol_version=protocol, little_endian=True, type_sizes={})
    heads = [pickle.dumps(part, protocol=2) for part in (magic, protocol, system)]
    path.write_bytes(b"".join(heads) + nested("keys", 200_000) + pickle.dumps([], protocol=2))
    found = run_alone(["predict", path, path], tmp_path / "out", program=cli.console)
    the_line_of(found, path, "nested more than 100 deep")


@pytest.mark.parametrize("name", ["train", "meta"])
def test_a_batch_of_cifar_nested_deeply_is_refused(recipe, tmp_path, name):
    folder = made_cifar(tmp_path, train=40, test=37)
    (folder / name).write_bytes(nested("keys", 300_000))
    words = [*recipe[: recipe.index("--data-path")], "--data-path", tmp_path]
    found = run(words, tmp_path / "run", timeout=30)
    the_line_of(found, folder / name, "nested more than 100 deep")
    assert not (tmp_path / "run").exists()


BATCHES = {
    "data of no type": {b"data": 3, b"fine_labels": [0]},
    "labels by name": {b"data": None, b"fine_labels": {}},
    "labels of 400 digits": {b"data": None, b"fine_labels": [10**400] * 40},
    "labels that are infinite": {b"data": None, b"fine_labels": [float("inf")] * 40},
    "labels of lists": {b"data": None, b"fine_labels": [[0], [0, 1]]},
    "keys that are no text": {3: 4},
    "keys of other letters": {b"\xff": 4},
    "no dictionary": [1, 2],
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_of_cifar_of_other_content_is_refused(recipe, tmp_path, case):
    folder = made_cifar(tmp_path, train=40, test=37)
    batch = BATCHES[case]
    if isinstance(batch, dict) and batch.get(b"data", 0) is None:
        whole = pickle.loads((folder / "train").read_bytes(), encoding="bytes")
        batch = {**batch, b"data": whole[b"data"]}
    (folder / "train").write_bytes(pickle.dumps(batch, protocol=2))
    words = [*recipe[: recipe.index("--data-path")], "--data-path", tmp_path]
    refused(*words, "--output_dir", tmp_path / "run", names=[folder / "train"])


def test_names_of_classes_of_cifar_that_are_no_text_are_refused(recipe, tmp_path):
    folder = made_cifar(tmp_path, train=40, test=37)
    for names in ([3] * 100, [None] * 100, [b"\xff"] * 100, [["a"]] * 100):
        (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=2))
        words = [*recipe[: recipe.index("--data-path")], "--data-path", tmp_path]
        refused(*words, "--output_dir", tmp_path / "run", names=[folder / "meta"])


def test_a_header_of_safetensors_nested_deeply_is_refused(tmp_path):
    path = tmp_path / "deep.safetensors"
    header = b'{"a":' * 100_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    found = run_alone(["predict", path, path], tmp_path / "out", program=cli.console)
    the_line_of(found, path)
