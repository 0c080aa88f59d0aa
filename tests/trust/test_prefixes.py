"""Weights as other programs wrap them: their prefixes are taken off, or named."""

import pytest
import timm
import torch
from PIL import Image

import fambav
from fambav import cli
from fambav.engine.checkpoint import CheckpointError
from tests import made
from tests.trust.refusals import call, refused

MODEL = dict(model="vim_micro", input_size=32, patch_size=8, num_classes=10)
FLAGS = ["--model", "vim_micro", "--input-size", "32", "--patch-size", "8"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = made.run(tmp_path_factory.mktemp("weights") / "checkpoint.pth")
    return fambav.from_pretrained(path).state_dict()


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def fully_sharded(name):
    """FSDP wraps modules inside of a model too."""
    return f"_fsdp_wrapped_module.{name.replace('.mixer.', '._fsdp_wrapped_module.mixer.')}"


WRAPPED = {
    "DDP of compile": lambda w: {"model": prefixed(w, "module._orig_mod.")},
    "FSDP": lambda w: {"model": {fully_sharded(name): value for name, value in w.items()}},
    "averaged": lambda w: {**prefixed(w, "module."), "n_averaged": torch.tensor(3)},
    "Lightning with a loss": lambda w: {
        "pytorch-lightning_version": "2.5.0",
        "epoch": 3,
        "state_dict": {**prefixed(w, "model._orig_mod."), "criterion.weight": torch.ones(3)},
    },
    "a head of another's": lambda w: {**prefixed(w, "backbone."), "head.weight": torch.ones(7, 64)},
    "twice the same": lambda w: {"state_dict": prefixed(w, "model.model.")},
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_all_weights_begin_with_is_taken_off(weights, tmp_path, case):
    torch.save(WRAPPED[case](weights), tmp_path / "wrapped.pth")
    net = fambav.from_pretrained(tmp_path / "wrapped.pth", **MODEL)
    found = net.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def dense(weights):
    """mmseg's: a backbone without a head, and what decodes its maps."""
    body = {name: value for name, value in weights.items() if not name.startswith("head.")}
    decoder = {"decode_head.conv_seg.weight": torch.ones(19, 4, 1, 1)}
    return {"meta": {"epoch": 3}, "state_dict": {**prefixed(body, "backbone."), **decoder}}


def test_a_backbone_of_a_segmenter_starts_a_run(weights):
    net = timm.create_model("vim_micro", num_classes=10, img_size=32, patch_size=8)
    own = net.head.weight
    net.load_state_dict(net.remap(dense(weights), head="drop"))
    assert torch.equal(net.pos_embed, weights["pos_embed"])
    assert net.head.weight is own


def test_prefixes_of_timms_models_are_taken_off(tmp_path):
    net = timm.create_model("resnet10t", num_classes=10)
    torch.save({"state_dict": prefixed(net.state_dict(), "encoder.")}, tmp_path / "wrapped.pth")
    found = fambav.from_pretrained(tmp_path / "wrapped.pth", model="timm/resnet10t")
    assert torch.equal(found.fc.weight, net.fc.weight)


AMBIGUOUS = {
    "student and teacher": (
        lambda w: {**prefixed(w, "student."), **prefixed(w, "teacher.")},
        ["student., teacher."],
    ),
    "half of them": (
        lambda w: {f"{'ab'[n % 2]}.{name}": w[name] for n, name in enumerate(w)},
        ["a., b."],
    ),
    "another model": (lambda w: {"model.conv1.weight": torch.ones(3, 3)}, ["model."]),
    "no head": (lambda w: dense(w)["state_dict"], ["backbone. lacks 2", "head.bias"]),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_prefixes_that_may_mean_several_things_are_named(weights, tmp_path, case):
    made_of, names = AMBIGUOUS[case]
    path = tmp_path / "wrapped.pth"
    torch.save({"state_dict": made_of(weights)}, path)
    with pytest.raises(CheckpointError, match=r"^[^\n]+, expected [^\n]+$") as refusal:
        fambav.from_pretrained(path, **MODEL)
    line = str(refusal.value)
    assert all(name in line for name in (str(path), *names)), line
    if case == "student and teacher":
        for reader in ("--finetune", "--eval --resume"):
            words = [*FLAGS, "--data-set", "DIGITS", *reader.split(), path, "--threads", "1"]
            refused(*words, "--output_dir", tmp_path / "run", names=[path, *names])


def test_a_wrapped_file_is_read_by_commands(weights, tmp_path):
    torch.save(WRAPPED["Lightning with a loss"](weights), tmp_path / "wrapped.ckpt")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ["predict", tmp_path / "wrapped.ckpt", tmp_path / "a.png", *FLAGS]
    found = call(*words, program=cli.console)
    assert found.status == 0, found.err
