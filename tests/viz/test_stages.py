"""Pictures of models of stages, each of which has a grid of its own and starts whole."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

import fambav
import fambav.models
from fambav import cli, viz
from fambav.config import Config
from fambav.data import load
from fambav.training import pictured
from tests.made import go, refused, run

IMAGE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
WORDS = ["--reduction", "tome", "--reduction-schedule", "1.1:20,1.2:9,2.2:3"]
show = partial(go, "show", program=cli.console)


def made(name="vmamba_nano", method="tome", schedule="1.1:20,1.2:9,2.2:3"):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, img_size=32, depths=(2, 2, 1, 1))
    return fambav.reduce(model, method, schedule)


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize("name", ["vmamba_nano", "vssd_nano"])
@pytest.mark.parametrize(
    ("method", "options"), [("tome", {}), ("random", {}), ("utrc", {"signal": "mixed"})]
)
def test_traces_are_the_forward_pass_itself(name, method, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, img_size=32, depths=(2, 2, 1, 1))
    fambav.reduce(model, method, "1.2:20,2.2:3", **options)
    model.train()
    traces = viz.trace_stages(model, IMAGE)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = model(IMAGE[None])[0]
    lengths = tuple(len(step.features) for trace in traces for step in trace.steps)
    assert lengths == model.reduction.schedule.lengths
    assert [trace.grid for trace in traces] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert [trace.kept for trace in traces] == [(64, 64, 44), (16, 16, 13), (4, 4), (1, 1)]
    assert ((traces[0].steps[1].source < 0).sum() == 20) == (method == "random")
    for trace in traces:
        np.testing.assert_allclose(trace.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert viz.trace_stages(model, traces) is traces


def test_features_are_what_a_mixer_reads():
    model, read = made(), []
    mixer = model.layers[1].blocks[0].op
    handle = mixer.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    step = viz.trace_stages(model, IMAGE)[1].steps[0]
    handle.remove()
    np.testing.assert_array_equal(step.features, read[0].reshape(16, -1).numpy())


def test_groups_are_those_of_the_stages_that_reduce():
    figure = viz.groups(made(), IMAGE)
    assert titles(figure) == [
        "start of stage 1: 64 tokens",
        "layer 1.1: 44 tokens",
        "layer 1.2: 35 tokens",
        "start of stage 2: 16 tokens",
        "layer 2.1: 16 tokens",
        "layer 2.2: 13 tokens",
    ]
    assert "vmamba_nano, tome, 20 to 3 tokens at layers 1.1, 1.2, 2.2" in figure.texts[0].get_text()
    few = viz.groups(made(), IMAGE, layers=[4])
    assert titles(few) == ["start of stage 2: 16 tokens", "layer 2.2: 13 tokens"]
    whole = titles(viz.groups(made(method="none"), IMAGE))
    assert [title for title in whole if "start" not in title] == [
        "layer 1.1: 64 tokens",
        "layer 1.2: 64 tokens",
        "layer 2.1: 16 tokens",
        "layer 2.2: 16 tokens",
        "layer 3.1: 4 tokens",
        "layer 4.1: 1 tokens",
    ]


def test_other_pictures_name_layers_by_stage():
    model = made()
    traces = viz.trace_stages(model, IMAGE)
    frames = viz.animation(model, traces)
    assert [frame.axes[0].get_title().split(":")[0] for frame in frames][1] == (
        "behind layer 1.1 of 2.2"
    )
    assert len(frames) == 6
    names = [text.get_text() for text in frames[0].axes[1].get_xticklabels()]
    assert names == ["1.0", "1.1", "1.2", "2.0", "2.1", "2.2"]
    assert titles(viz.similarity(model, traces))[:4] == [
        f"layer {name}" for name in ("1.1", "1.2", "2.1", "2.2")
    ]
    whole, *shorter = titles(viz.scan(model, traces))
    assert whole.startswith("whole stage 1: 64 patch tokens\n100%")
    assert [title.split(":")[0] for title in shorter] == [
        *("layer 1.1", "layer 1.2"),
        *("whole stage 2", "layer 2.2"),
    ]
    lines = viz.mean_similarity(model, traces).axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [6, 6]
    labels = [text.get_text() for text in viz.layers(model).axes[1].get_xticklabels()]
    assert labels == ["1.1", "1.2", "2.1", "2.2", "3.1", "4.1"]


def test_training_gets_the_same_picture():
    model = made()
    config = Config.from_flat(dict(model="vmamba_nano", data_set="DIGITS", input_size=32))
    drawn = pictured.tokens(config, model, load("DIGITS"))
    assert drawn.shape == (3, 160, 6 * 160 + 5 * 8)
    assert pictured.tokens(config, made(method="none"), load("DIGITS")) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    names = ("vmamba_nano", "vssd_nano", "groupmamba_nano")
    return SimpleNamespace(
        **{name: run(folder / f"{name}.pth", model=name, patch_size=None) for name in names}
    )


def test_all_but_strategies_is_drawn_of_a_file(files, tmp_path):
    for words, more in ((WORDS, "tome, 20 to 3 tokens"), ([], "no reduction")):
        for name, missing in (("vmamba_nano", set()), ("vssd_nano", {"scan.png"})):
            found = show(getattr(files, name), *words, "--output_dir", tmp_path / name)
            assert found.status == 0, found.err
            lines = dict(line.split("  ", 1) for line in found.out.splitlines())
            kinds = {"groups", "similarity", "mean_similarity", "layers", "scan"}
            drawn = {f"{kind}.png" for kind in kinds} | {"animation.gif"}
            assert {Path(path).name for path in lines} == drawn - missing
            assert more in lines[str(tmp_path / name / "groups.png")]


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("vssd_nano", "strategies", "model is a VSSD, expected one of a single stage, in which"),
        ("vssd_nano", "scan", "model is a VSSD, expected one that scans sequences"),
        ("groupmamba_nano", "groups", "'groupmamba_nano', expected one whose tokens can be red"),
    ],
)
def test_what_there_is_not_of_stages_is_refused_in_one_line(files, tmp_path, name, what, message):
    words = ("show", getattr(files, name), "--what", what, "--output_dir", tmp_path)
    assert message in refused(*words, program=cli.console)
