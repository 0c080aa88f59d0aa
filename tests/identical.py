"""Whether two runs came to the same bits, whatever time they took."""

import csv
import json
from pathlib import Path

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fambav.engine import checkpoint

MEASURED = {"train_seconds", "eval_seconds", "save_seconds", "images_per_second", "rss_mib"}
PARTS = ("model", "optimizer", "model_ema", "scaler", "epoch", "updates", "losses")
CHECKPOINTS = ("checkpoint.pth", "previous_checkpoint.pth", "best_checkpoint.pth")
APART = {"output_dir", "resume", "save_every"}  # settings that a run and its continuation may have


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def lasting(records):
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]


def same(one, other):
    """Whether two trees of plain data and tensors are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def assert_identical(one, other):
    """See that two finished runs came to the same bits: weights, average, optimizer and log."""
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        ours, theirs = (checkpoint.load(Path(folder) / name) for folder in (one, other))
        for part in (*PARTS, *(name for name in theirs if name.startswith("best_"))):
            assert same(ours[part], theirs[part]), (name, part)
        assert lasting(ours["history"]) == lasting(theirs["history"])
    assert lasting(log(one)) == lasting(log(other))
    assert not list(Path(one).glob(".tmp-*")), "a killed run leaves nothing behind for good"


def assert_same_folders(one, other):
    """See that the folders of two finished runs hold the same files, and these the same content."""
    one, other = Path(one), Path(other)
    assert _names(one) == _names(other)
    for name in filter(lambda name: (other / name).exists(), CHECKPOINTS):
        ours, theirs = (_checkpoint(folder / name) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        assert [part for part in ours if not same(ours[part], theirs[part])] == [], name
    ours, theirs = (checkpoint.load(folder / "model.safetensors") for folder in (one, other))
    assert same(ours["model"], theirs["model"])
    assert ours["metadata"].keys() == theirs["metadata"].keys()
    assert ours["metadata"]["schedule"] == theirs["metadata"]["schedule"]
    for read in (log, _table):
        assert lasting(read(one)) == lasting(read(other))
    assert scalars(one) == scalars(other)
    assert _settings(one) == _settings(other)
    assert (one / "plan.json").read_bytes() == (other / "plan.json").read_bytes()


def scalars(folder):
    """What TensorBoard shows of a run, but for what was measured: steps and values by name."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name.removeprefix("epoch/") not in MEASURED
    }


def _names(folder):
    names = (path.name.split(".out")[0] for path in folder.iterdir())
    return sorted(name for name in names if not name.startswith("earlier-"))


def _checkpoint(path):
    state = checkpoint.load(path)
    config = {name: value for name, value in state["config"].items() if name not in APART}
    history = lasting(state["history"])
    return {**state, "config": config, "history": history, "seconds": None}


def _table(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def _settings(folder):
    known = yaml.safe_load((folder / "config.yaml").read_text())
    return {name: value for name, value in known.items() if name not in APART}


def same_gradients_when_checkpointed(build, images):
    """Hold every gradient with checkpointing against that without, bit for bit."""
    grads = []
    for enable in (False, True):
        model = build()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        (model(images) * torch.arange(model.num_classes)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
