"""Whether two runs came to the same bits, whatever time they took."""

import json
from pathlib import Path

import torch

from fambav.engine import checkpoint

MEASURED = {"train_seconds", "eval_seconds", "save_seconds", "images_per_second", "rss_mib"}
PARTS = ("model", "optimizer", "model_ema", "epoch", "best_acc1", "updates", "losses")


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
        for part in PARTS:
            assert same(ours[part], theirs[part]), (name, part)
        assert lasting(ours["history"]) == lasting(theirs["history"])
    assert lasting(log(one)) == lasting(log(other))
    assert not list(Path(one).glob(".tmp-*")), "a killed run leaves nothing behind for good"
