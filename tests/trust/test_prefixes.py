"""Weights as other programs wrap them: their prefixes are taken off, or named."""

import pytest
import torch

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


WRAPPED = {
    "DDP": lambda w: {"model": prefixed(w, "module.")},
    "compile": lambda w: {"model": prefixed(w, "_orig_mod.")},
    "DDP of compile": lambda w: prefixed(w, "module._orig_mod."),
    "compile of DDP": lambda w: prefixed(w, "_orig_mod.module."),
    "Lightning": lambda w: {
        "pytorch-lightning_version": "2.5.0",
        "epoch": 3,
        "state_dict": prefixed(w, "model."),
    },
    "Lightning, net": lambda w: {"state_dict": prefixed(w, "net.")},
    "Lightning of compile": lambda w: {"state_dict": prefixed(w, "model._orig_mod.")},
    "Lightning of a backbone": lambda w: {"state_dict": prefixed(w, "backbone.")},
    "Lightning with a loss": lambda w: {
        "state_dict": {**prefixed(w, "model."), "criterion.weight": torch.ones(3)}
    },
    "a bare state_dict": lambda w: prefixed(w, "model."),
    "FSDP": lambda w: {"model": prefixed(w, "_fsdp_wrapped_module.")},
    "averaged": lambda w: {"state_dict": {**prefixed(w, "module."), "n_averaged": torch.tensor(3)}},
    "any name that all have": lambda w: {"state_dict": prefixed(w, "student.encoder.")},
    "a model that is wrapped twice": lambda w: {"state_dict": prefixed(w, "model.model.")},
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


def test_a_backbone_of_a_segmenter_starts_a_run(weights, tmp_path):
    torch.save(dense(weights), tmp_path / "mmseg.pth")
    words = [*FLAGS, "--data-set", "DIGITS", "--epochs", "1", "--batch-size", "512"]
    words += ["--num_workers", "0", "--threads", "1", "--warmup-epochs", "0", "--device", "cpu"]
    found = call(*words, "--finetune", tmp_path / "mmseg.pth", "--output_dir", tmp_path / "run")
    assert found.status == 0, found.err


def test_a_backbone_of_a_segmenter_has_no_classes_and_that_is_what_is_said(weights, tmp_path):
    torch.save(dense(weights), tmp_path / "mmseg.pth")
    with pytest.raises(CheckpointError, match=r"^[^\n]*head[^\n]*, expected [^\n]*$") as refusal:
        fambav.from_pretrained(tmp_path / "mmseg.pth", **MODEL)
    assert "0 classes" not in str(refusal.value)
    assert "backbone." in str(refusal.value)


AMBIGUOUS = {
    "student and teacher": lambda w: {**prefixed(w, "student."), **prefixed(w, "teacher.")},
    "half of them": lambda w: {
        f"a.{name}" if place % 2 else f"b.{name}": value
        for place, (name, value) in enumerate(w.items())
    },
    "another model": lambda w: {"model.conv1.weight": torch.ones(3, 3)},
}


@pytest.mark.parametrize("reader", ["from_pretrained", "--finetune", "--eval --resume"])
@pytest.mark.parametrize("case", AMBIGUOUS)
def test_prefixes_that_may_mean_several_things_are_named(weights, tmp_path, case, reader):
    path = tmp_path / "wrapped.pth"
    torch.save({"state_dict": AMBIGUOUS[case](weights)}, path)
    names = {"student and teacher": ["student.", "teacher."], "half of them": ["a.", "b."]}
    wanted = [path, *names.get(case, ["model."])]
    if reader == "from_pretrained":
        with pytest.raises(CheckpointError, match=r"^[^\n]+$") as refusal:
            fambav.from_pretrained(path, **MODEL)
        line = str(refusal.value)
        assert all(str(name) in line for name in wanted), line
    else:
        words = [*FLAGS, "--data-set", "DIGITS", *reader.split(), path, "--threads", "1"]
        line = refused(*words, "--output_dir", tmp_path / "run", names=wanted)
    assert "0 classes" not in line


def test_a_wrapped_file_is_read_by_commands(weights, tmp_path):
    from PIL import Image

    torch.save(WRAPPED["Lightning"](weights), tmp_path / "wrapped.ckpt")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ["predict", tmp_path / "wrapped.ckpt", tmp_path / "a.png", *FLAGS]
    found = call(*words, program=cli.console)
    assert found.status == 0, found.err
