"""One rule for which file of weights a folder means, wherever weights are read."""

import shutil

import pytest
import torch

import fambav
from fambav import cli
from fambav.data import load
from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from fambav.engine.run_dir import weights_file
from fambav.timm_compat import timm
from tests.made import go, run

TRAIN = """--model vim_micro --patch-size 8 --input-size 32 --data-stats own --num_workers 0
    --threads 1 --epochs 1 --warmup-epochs 0 --batch-size 16 --output_dir {out}"""
READERS = {
    "eval": "main.py --eval --num_workers 0 --resume {run}",
    "eval of weights": "main.py --eval --num_workers 0 --finetune {run}",
    "finetune": f"main.py {TRAIN} --finetune {{run}}",
    "teacher": f"main.py {TRAIN} --distillation-type soft --teacher-path {{run}}",
    "predict": "predict {run} {image} --device cpu",
    "evaluate": "evaluate {run} --num_workers 0",
    "export": "export {run} --format safetensors --noise --output_dir {out}",
    "show": "show {run} --what groups --output-dir {out}",
    "search-plan": "search-plan {run} --budget token-layers:0.7 --images 8 --trials 0 --steps 2",
    "tune": "tune {run} --margin 1",
}


class Stop(ValueError):
    """Raised where the weights would be loaded."""

    __module__ = "fambav.training"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose last, best and plain weights are copies of one file."""
    folder = tmp_path_factory.mktemp("run")
    run(folder / "best_checkpoint.pth")
    for name in ("checkpoint.pth", "previous_checkpoint.pth", "model.safetensors"):
        shutil.copy(folder / "best_checkpoint.pth", folder / name)
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_a_run_opens_its_best_checkpoint(folder, tmp_path, monkeypatch, reader):
    real, opened = checkpoint.load, []

    def watched(path, **options):
        opened.append(path.name)
        return real(path, **options)

    def stop(self, *args, **options):
        raise Stop("the weights are read")

    monkeypatch.setattr(checkpoint, "load", watched)
    monkeypatch.setattr("fambav.training.run_state.RunState.load_into", stop)
    image = tmp_path / "image.png"
    load("DIGITS").val[0][0].save(image)
    words = READERS[reader].format(run=folder, image=image, out=tmp_path / "out").split()
    program = cli.main if words[0] == "main.py" else cli.console
    found = go(*words[words[0] == "main.py" :], program=program)
    assert "the weights are read" in found.err, found.out + found.err
    assert set(opened) == {"best_checkpoint.pth"}


def test_a_folder_means_its_best_then_its_last_checkpoint_then_its_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    for name in ("best_checkpoint.pth", "checkpoint.pth", "model.safetensors"):
        assert weights_file(tmp_path / "run") == tmp_path / "run" / name
        assert weights_file(tmp_path / "run" / name) == tmp_path / "run" / name
        (tmp_path / "run" / name).unlink()
    with pytest.raises(CheckpointError, match=r"holds no best_checkpoint\.pth, expected a run"):
        weights_file(tmp_path / "run")


def test_the_weights_of_a_run_are_those_that_were_scored_and_not_their_average(tmp_path):
    def change(state):
        state["model_ema"] = {name: value + 1 for name, value in state["model"].items()}

    path = run(tmp_path / "best_checkpoint.pth", change)
    wanted = checkpoint.load(path)["model"]
    for name, value in fambav.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, wanted[name])
    sizes = dict(patch_size=8, num_classes=10)
    averaged = timm.create_model("vim_micro", **sizes, checkpoint_path=str(path))
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, wanted[name] + 1), "timm's own rule"
