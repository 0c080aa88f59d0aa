"""Images that are not square, from the flag to what a run leaves behind and all that reads it."""

import json

import pytest
import torch
import yaml

import fambav
from fambav import cli
from fambav.config import Config, parse
from fambav.data import load
from fambav.engine import checkpoint
from fambav.training.network import layout
from tests.data.made import made_cifar
from tests.made import go

SIZE = (16, 24)
RUN = """--model vim_micro --patch-size 8 --data-set CIFAR --data-path {data} --epochs 1
    --batch-size 8 --num_workers 0 --warmup-epochs 0 --threads 1 --mixup 0 --cutmix 0"""
FUSED = "--fusion-strategy upper --fusion-layer 4 --fusion-token 1 --fusion-method ordered"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rectangles")
    made_cifar(folder / "data", train=16, test=9)
    run = folder / "run"
    words = f"{RUN.format(data=folder / 'data')} {FUSED} --input-size 16 24 --output_dir {run}"
    found = go(*words.split())
    assert found.status == 0, found.err
    assert "total removed: 3 of 7 tokens" in found.out
    return folder


def test_a_run_records_height_and_width(place):
    run = place / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["input_size"] == [16, 24]
    state = checkpoint.load(run / "checkpoint.pth")
    assert tuple(state["config"]["input_size"]) == SIZE
    assert state["grid"] == [2, 3]
    assert parse(["--config", str(run / "config.yaml")]).model.input_size == SIZE
    assert json.loads((run / "plan.json").read_text())["start"] == 7


def test_a_run_is_evaluated_and_resumed_at_its_own_size(place):
    words = (
        f"--eval --resume {place / 'run'} --num_workers 0 --threads 1 --data-path {place / 'data'}"
    )
    found = go(*words.split())
    assert found.status == 0, found.err
    assert "note:" not in found.out
    again = go(*words.split(), "--input-size", "24", "16")
    assert again.status == 0, again.err
    assert "note: input_size [24, 16] differs from the checkpoint's [16, 24]" in again.out
    same = f"{RUN.format(data=place / 'data')} {FUSED} --output_dir {place / 'run'} --resume auto"
    assert go(*same.split(), "--input-size", "16", "24").status == 0
    refused = go(*same.split(), "--input-size", "16")
    assert refused.status == 2
    assert "input_size [16, 24] -> 16" in refused.err


def test_a_run_is_opened_exported_shown_and_predicted_with(place, tmp_path):
    net = fambav.from_pretrained(place / "run")
    assert net.img_size == SIZE
    assert net.pretrained_cfg["input_size"] == (3, *SIZE)
    image = tmp_path / "image.png"
    load("DIGITS").val[0][0].save(image)
    for words in (
        f"predict {place / 'run'} {image} --device cpu",
        f"show {place / 'run'} --what groups --output-dir {tmp_path / 'shown'} --image {image}",
        f"export {place / 'run'} --format hf --noise --output_dir {tmp_path / 'out'}",
    ):
        found = go(*words.split(), program=cli.console)
        assert found.status == 0, found.err
    twin = fambav.from_pretrained(tmp_path / "out")
    images = torch.randn(2, 3, *SIZE)
    assert torch.equal(twin(images), net(images))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["fambav"]["settings"][
        "input_size"
    ] == [16, 24]


@pytest.mark.parametrize("size", ["24 16", "24"])
def test_training_goes_on_at_another_size(place, size, tmp_path):
    words = f"{RUN.format(data=place / 'data')} --finetune {place / 'run'} --input-size {size}"
    found = go(*words.split(), "--output_dir", str(tmp_path / "run"))
    assert found.status == 0, found.err
    rows = checkpoint.load(tmp_path / "run" / "checkpoint.pth")["model"]["pos_embed"].shape[1]
    assert rows == {"24 16": 7, "24": 10}[size]


def test_plan_and_flops_count_the_patches_of_both_sides(capsys):
    words = ["--model", "vim_micro", "--input-size", "32", "48", *FUSED.split()]
    assert cli.console(["plan", *words]) == 0
    assert "97" in capsys.readouterr().out
    assert cli.console(["flops", *words]) == 0
    assert "32 x 48" in capsys.readouterr().out


def test_a_model_of_timm_s_is_built_for_both_sides():
    config = Config.from_flat({"model": "timm/test_vit", "input_size": [32, 48]})
    assert layout(config).input_size == (32, 48)
