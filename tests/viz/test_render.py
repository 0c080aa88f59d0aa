"""Runs and their pictures: what is drawn of which run, and what is refused."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fambav
import fambav.models
from fambav import cli, viz
from fambav.commands import show
from fambav.config import parse
from fambav.data import load
from fambav.registry import PICTURES
from fambav.training import pictured
from fambav.viz.compare import compare_strategies, described, reducing
from fambav.viz.render import traced
from tests.data.made import made_cifar
from tests.made import go
from tests.made import refused as refused_

RUN = """--model vim_micro --input-size 16 --data-set CIFAR --num_workers 0 --batch-size 8
    --epochs 1 --warmup-epochs 0 --threads 1 --no-model-ema"""
FUSED = "--fusion-strategy upper --fusion-layer 4 --fusion-token 3"
PRUNED = "--class-token none --reduction evit --reduction-schedule r:3@2-4"

fambav_ = partial(go, program=cli.console)
refused = partial(refused_, program=cli.console)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made_cifar(folder / "data", train=16, test=9)
    made = {}
    for name, flags in {"fused": FUSED, "pruned": PRUNED, "unreduced": ""}.items():
        made[name] = folder / name
        words = [*RUN.split(), *flags.split(), "--data-path", folder / "data"]
        found = go(*words, "--output_dir", made[name])
        assert found.status == 0, found.err
    return SimpleNamespace(**made)


def test_every_picture_of_a_run_is_written_and_named_in_a_line(runs, tmp_path):
    found = fambav_("show", runs.fused, "--output_dir", tmp_path / "a", "--svg")
    assert found.status == 0, found.err
    lines = dict(line.split("  ", 1) for line in found.out.splitlines())
    drawn = set(PICTURES) - {"masks", "boxes"}
    names = {f"{name}.{'gif' if name == 'animation' else 'png'}" for name in drawn}
    assert {Path(path).name for path in lines} == names
    also = {f"{name}.svg" for name in drawn - {"animation"}}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names | also
    told = "vim_micro, famba-v, 3 tokens at layers 4-6: CIFAR, held-out image 0, labelled "
    assert told in lines[str(tmp_path / "a" / "groups.png")]
    with Image.open(tmp_path / "a" / "animation.gif") as animation:
        assert animation.n_frames == 6 + 1


def test_the_same_pictures_have_the_same_bytes(runs, tmp_path):
    what = ["groups", "layers", "animation"]
    first, second = (
        dict(viz.render([runs.fused], tmp_path / name, what=what)) for name in ("a", "b")
    )
    assert list(first) == what
    for name, picture in first.items():
        assert picture.path.read_bytes() == second[name].path.read_bytes()
        assert picture.title == second[name].title


def test_several_runs_share_their_curves_and_have_the_rest_each(runs, tmp_path):
    found = dict(viz.render([runs.pruned, runs.unreduced], tmp_path, what=["groups", "curves"]))
    assert list(found) == ["pruned/groups", "unreduced/groups", "curves"]
    assert found["unreduced/groups"].path == tmp_path / "unreduced_groups.png"
    assert found["curves"].title == "training of pruned, unreduced"


def test_several_images_have_numbers(runs, tmp_path):
    source = viz.Source(index=(0, 8))
    found = dict(viz.render([runs.unreduced], tmp_path, what=["scan"], source=source))
    assert list(found) == ["scan/0", "scan/1"]
    assert "held-out image 8" in found["scan/1"].title


def test_pictures_go_into_the_run_unless_told_otherwise(runs):
    found = fambav_("show", runs.unreduced / "best_checkpoint.pth", "--what", "layers")
    assert found.out.startswith(str(runs.unreduced / "pictures" / "layers.png"))
    assert (runs.unreduced / "pictures" / "layers.png").is_file()


def test_an_image_file_can_be_looked_at(runs, tmp_path):
    path = tmp_path / "grey.png"
    Image.new("L", (40, 30), 128).save(path)
    found = fambav_(
        "show", runs.fused, "--image", path, "--what", "groups", "--output-dir", tmp_path
    )
    assert "grey.png, seen as " in found.out


def test_another_reduction_can_be_tried_on_the_same_weights(runs, tmp_path):
    words = ("--reduction", "ordered", "--reduction-schedule", "r:2@2-3", "--what", "layers")
    found = fambav_("show", runs.unreduced, *words, "--output_dir", tmp_path)
    assert "vim_micro, ordered, 2 tokens at layers 2-3" in found.out


def test_pixels_are_the_image_as_the_model_sees_it(runs):
    ((_, (trace,), *_),) = traced(runs.unreduced)
    data = load("CIFAR", runs.unreduced.parent / "data")
    picture = np.asarray(data.val[0][0].resize((16, 16), Image.Resampling.BICUBIC)) / 255
    assert trace.pixels.shape == (16, 16, 3)
    assert np.abs(trace.pixels - picture).max() < 0.02
    assert len(trace.logits) == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "run is missing, expected fambav show RUN ..."),
        (
            ("{unreduced}", "--what", "gruops"),
            "--what is 'gruops', expected names of pictures; did you",
        ),
        (("{unreduced}", "--index", "9"), "index is 9, expected 0 to 8, held-out images of CIFAR"),
        (("{unreduced}", "--index", "x"), "--index is 'x', expected a whole number"),
        (
            ("{unreduced}", "--image", "{unreduced}/log.txt"),
            "log.txt is of no known format, expected an image",
        ),
        (("{unreduced}", "--image", "{unreduced}/no.png"), "no.png is missing, expected an image"),
        (("{unreduced}/nowhere",), "nowhere, expected a file that exists"),
        (
            ("{unreduced}/..",),
            "holds no best_checkpoint.pth, expected a run folder or one exported as",
        ),
        (("{unreduced}/log.txt",), "log.txt"),
        (("{unreduced}", "{unreduced}"), "more than once, expected every run once"),
        (("{unreduced}", "--lenght", "3"), "--lenght is not a flag"),
        (("{unreduced}/..", "--what", "curves"), "expected a folder with log.txt to draw curves"),
    ],
)
def test_what_cannot_be_shown_is_one_line(runs, tmp_path, words, message):
    words = [word.format(unreduced=runs.unreduced) for word in words]
    assert message in refused("show", *words, *(["--output_dir", tmp_path] if words else []))


def test_a_flag_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="did you mean 'groups'"):
        show.run(["nowhere", "--what", "group"])


def test_missing_matplotlib_is_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refused("show", runs.unreduced, "--what", "curves", "--output_dir", tmp_path)
    assert "matplotlib is not installed" in error


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_a_file_that_says_nothing_of_its_model_needs_its_name(name, tmp_path):
    model = timm.create_model(name, num_classes=4, img_size=16)
    torch.save({"model": model.state_dict()}, tmp_path / "foreign.pth")
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    words = (
        "show",
        tmp_path / "foreign.pth",
        "--image",
        tmp_path / "black.png",
        "--what",
        "layers",
    )
    assert "name its model with --model" in refused(*words)
    found = fambav_(*words, "--model", name, "--input-size", "16")
    assert found.status == 0, found.err
    assert f"{name}, no reduction" in found.out


@pytest.mark.parametrize("method", ["none", "famba-v", "prune-aligned", "r-meeto"])
def test_strategies_remove_about_as_many_tokens_and_leave_the_model_as_it_was(method):
    model = timm.create_model("vim_micro", num_classes=3)
    fambav.reduce(model, method, "r:10@2-5")
    own = model.reduction
    name, found = compare_strategies(model)
    found = {label.split("\n")[0]: reduction for label, reduction in found.items()}
    assert name == ("famba-v" if method == "none" else method)
    names = ["none", "all", "interleaved", "lower", "upper"]
    assert list(found) == names + ["this run"] * (method != "none")
    assert found["none" if method == "none" else "this run"] is own
    wanted = own.schedule.removed or 0.75 * 65
    for strategy, reduction in found.items():
        if strategy != "none":
            assert reduction.name == name
            assert abs(reduction.schedule.removed - wanted) <= 0.1 * wanted
        with reducing(model, reduction):
            assert model.reduction is reduction
        assert model.reduction is own
    assert found["upper"].schedule.counts[0] == found["lower"].schedule.counts[-1] == 0


def test_a_method_that_cannot_do_every_strategy_gives_way_to_one_that_can():
    model = timm.create_model("vim_micro", num_classes=3)
    fambav.reduce(model, "storm", "tokens:50,43@2,3")
    name, found = compare_strategies(model)
    assert name == "famba-v (storm cannot do them all)"
    *strategies, own = found.values()
    assert [each.name for each in strategies] == ["none"] + 4 * ["famba-v"]
    assert own is model.reduction


def test_reductions_are_described_in_a_few_words():
    model = timm.create_model("vim_micro", num_classes=3)
    told = {
        "r:5@3": "ordered, 5 tokens at layer 3",
        "r:5@2-6/2": "ordered, 5 tokens at every 2nd layer from 2 to 6",
        "list:1,0,0,2": "ordered, 2 to 1 tokens at layers 1, 4",
    }
    for schedule, words in told.items():
        assert described(fambav.reduce(model, "ordered", schedule).reduction) == words
    masked = fambav.reduce(model, "ordered", "r:5", scan="masked").reduction
    assert described(masked) == "ordered, 5 tokens at layers 1-6, masked scan"
    assert described(fambav.reduce(model, "none").reduction) == "no reduction"


def images_of(run):
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


def test_tensorboard_shows_the_tokens_of_a_run_that_removes_some(runs):
    (image,) = images_of(runs.fused)["tokens"]
    assert image.step == 1
    assert image.height == 160
    assert image.width == 7 * 160 + 6 * 8
    assert images_of(runs.unreduced) == {}


def test_the_picture_for_tensorboard_changes_nothing():
    config = parse(["--model", "vim_micro", "--data-set", "DIGITS"])
    model = timm.create_model("vim_micro", num_classes=10).train()
    found = load("DIGITS")
    assert pictured.tokens(config, model, found) is None
    fambav.reduce(model, "random", "r:4@2-3").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    shown = pictured.tokens(config, model, found)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], drawn)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert shown.dtype == np.uint8
    tiles = [shown[..., n * 168 : n * 168 + 160] for n in range(7)]
    assert (tiles[0] == tiles[1]).all()
    assert (tiles[1] != tiles[2]).any()
    assert (tiles[3] == tiles[6]).all()


def test_a_grid_is_drawn_as_png_and_svg(tmp_path):
    def row(name, acc1, seconds):
        figures = {"acc1": acc1, "seconds": seconds, "token_layers": seconds / 10}
        estimates = {k: {"mean": v, "std": None, "count": 1} for k, v in figures.items()}
        return {
            "name": name,
            "labels": [name],
            "baseline": name == "unreduced",
            "method": "none" if name == "unreduced" else "ordered",
            "settings": {},
            "paper": None,
            "phases": {"scratch": estimates},
        }

    told = {
        "grid": "made",
        "title": "Made up",
        "phase": "scratch",
        "rows": [row("unreduced", 90.0, 10.0), row("upper", 89.0, 6.0)],
        "cells": [{"figures": {"memory_kind": "saved for backward"}}],
    }
    (tmp_path / "results.json").write_text(json.dumps(told))
    found = fambav_("pareto", tmp_path)
    assert found.status == 0, found.err
    assert [line.split("  ")[0] for line in found.out.splitlines()] == [
        str(tmp_path / "pareto.png"),
        str(tmp_path / "pareto.svg"),
    ]
    text = (tmp_path / "pareto.svg").read_text()
    assert "Made up: top-1 accuracy against cost, scratch" in text
    assert "memory: saved for backward" in text
    assert "results.json" in refused("pareto", tmp_path / "none")
    assert "phase" in refused("pareto", tmp_path, "--phase", "fine-tuned")
