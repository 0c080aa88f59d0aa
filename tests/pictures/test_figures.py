"""What is to be seen in each picture."""

import math
import sys

import numpy as np
import pytest
import timm
import torch
from matplotlib.text import Text
from PIL import Image

import fambav
import fambav.models
from fambav import pictures
from fambav.pictures import style
from fambav.pictures.tokens import spread

PIXELS = np.random.default_rng(0).random((16, 16, 3))
IMAGE = torch.from_numpy(PIXELS.transpose(2, 0, 1)).float()
TITLE = "vim_micro, ordered, 4 tokens at layers 1-3: made up, held-out image 0, labelled 3"


@pytest.fixture(scope="module")
def walk():
    torch.manual_seed(0)
    model = timm.create_model("vim_micro", num_classes=3, img_size=16, depth=3)
    return pictures.follow(fambav.reduce(model, "prune-aligned", "r:4@2-3"), IMAGE)


def log(*, epochs=4, ema=True):
    more = {"test_ema_acc1": 50.0} if ema else {}
    return [
        {"epoch": e, "test_acc1": 10.0 * e, "train_loss": 1 / (e + 1), "train_lr": 1e-3, **more}
        for e in range(epochs)
    ]


def every(walk):
    work = pictures.Work([4, 3, 2], [0, 1, 1], [4, 4, 4], "multiply-adds")
    return {
        "groups": pictures.over_depth(PIXELS, walk, title=TITLE),
        "strategies": pictures.strategies(PIXELS, {"upper": walk, "all": walk}, title=TITLE),
        "maps": pictures.maps(walk, title=TITLE),
        "likeness": pictures.likeness_curves(
            {"one": pictures.likeness(walk), "two": pictures.likeness(walk)}, title=TITLE
        ),
        "bars": pictures.bars((16, 12, 8), 16, work, title=TITLE),
        "scan": pictures.paths(PIXELS, walk, title=TITLE),
        "curves": pictures.curves({"a": log(), "b": log(epochs=1)}, title=TITLE),
    }


@pytest.fixture(scope="module")
def drawn(walk):
    figures = every(walk)
    for figure in figures.values():
        figure.draw_without_rendering()
    return figures


NAMES = ("groups", "strategies", "maps", "likeness", "bars", "scan", "curves")


def texts(figure):
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


@pytest.mark.parametrize("name", NAMES)
def test_type_can_be_read_at_half_size(drawn, name):
    figure = drawn[name]
    least = max(11, 0.018 * 72 * figure.get_figwidth())
    small = {t.get_text(): t.get_fontsize() for t in texts(figure) if t.get_fontsize() < least}
    assert small == {}
    sizes = {axes.title.get_fontsize() for axes in figure.axes if axes.get_title()}
    assert sizes <= {style.type_size(figure)}
    assert len(texts(figure)) > 4


@pytest.mark.parametrize("name", NAMES)
def test_titles_stay_within_the_picture_and_say_what_it_is(drawn, name):
    figure = drawn[name]
    assert " ".join(figure.get_suptitle().split()).startswith(TITLE)
    box, edge = figure.get_tightbbox(), 0.01  # inches
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) >= -edge
    assert box.x1 <= width + edge
    assert box.y1 <= height + edge


@pytest.mark.parametrize("name", NAMES)
def test_panels_do_not_cover_each_other(drawn, name):
    boxes = [axes.get_tightbbox() for axes in drawn[name].axes]
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            high = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide < 1.5 or high < 1.5


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_groups_are_shown_at_the_start_and_behind_each_layer(drawn, walk):
    assert titles(drawn["groups"]) == [
        "input: 17 tokens",
        "layer 1: 17 tokens",
        "layer 2: 13 tokens",
        "layer 3: 9 tokens",
    ]
    assert "crossed patches were dropped" in " ".join(drawn["groups"].get_suptitle().split())
    crosses = drawn["groups"].axes[-1].collections[-1].get_segments()
    assert len(crosses) == 2 * 8
    assert [
        t.split(":")[0] for t in titles(pictures.over_depth(PIXELS, walk, title="", layers=[3]))
    ] == [
        "input",
        "layer 3",
    ]


def test_strategies_are_rows_with_their_share_of_the_work(drawn):
    rows = [axes.get_ylabel() for axes in drawn["strategies"].axes if axes.get_ylabel()]
    share = f"{100 * (17 + 17 + 13) / 51:.0f}%"
    assert rows == [f"upper\n{share}", f"all\n{share}"]


def test_bars_are_as_high_as_the_numbers(drawn):
    tokens, operations = drawn["bars"].axes
    heights = [[bar.get_height() for bar in group] for group in tokens.containers]
    assert heights == [[16, 16, 16], [16, 12, 8]]
    dense, own, added = ([bar.get_height() for bar in g] for g in operations.containers)
    np.testing.assert_allclose(
        [dense, own, added], 1e-6 * np.array([[4] * 3, [4, 3, 2], [0, 1, 1]])
    )
    assert [bar.get_y() for bar in operations.containers[2]] == own  # one upon the other
    assert operations.get_ylabel() == "MFLOPs"
    assert "75% of the token-layers and 92% of the operations" in drawn["bars"].get_suptitle()


def test_cosine_maps_share_one_scale(drawn):
    images = [image for axes in drawn["maps"].axes for image in axes.images]
    assert [image.get_array().shape for image in images] == [(17, 17), (17, 17), (13, 13)]
    assert len({image.get_clim() for image in images}) == 1
    assert images[0].get_clim()[1] == 1


def test_curves_show_every_run_and_leave_out_what_none_has():
    figure = pictures.curves({"a": log(ema=False), "b": log(ema=False, epochs=2)}, title=TITLE)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["top-1 accuracy (%)", "loss", "learning rate"]
    first, second = figure.axes[0].lines
    assert first.get_xydata().tolist() == [[1, 0], [2, 10], [3, 20], [4, 30]]
    assert len(second.get_xydata()) == 2
    assert [t.get_text() for t in figure.legends[0].texts] == ["a", "b"]
    with pytest.raises(ValueError, match="logs have none of test_acc1"):
        pictures.curves({"a": [{"epoch": 0}]}, title=TITLE)


def test_no_two_curves_look_alike():
    looks = [str(style.line_style(number)) for number in range(28)]
    assert len(set(looks)) == 28


def test_layers_are_spread_evenly_up_to_the_last():
    assert spread(6, 11) == [1, 2, 3, 4, 5, 6]
    assert spread(24, 6) == [4, 8, 12, 16, 20, 24]
    assert spread(7, 3)[-1] == 7


def test_an_animation_has_a_frame_for_the_start_and_each_layer(walk, tmp_path):
    frames = pictures.frames(PIXELS, walk, title=TITLE)
    assert len(frames) == 4
    assert len({frame.shape for frame in frames}) == 1
    path = tmp_path / "made.gif"
    pictures.animate(frames, path)
    with Image.open(path) as animation:
        assert animation.format == "GIF"
        assert animation.n_frames == 4
        assert animation.size == frames[0].shape[1::-1]
        durations = []
        for number in range(4):
            animation.seek(number)
            durations.append(animation.info["duration"])
    assert durations == [900, 900, 900, 2700]


def test_files_have_their_format_and_size_and_always_the_same_bytes(walk, tmp_path):
    found = {}
    for number in range(2):
        figure = every(walk)["bars"]
        for kind in ("png", "svg"):
            path = tmp_path / f"{number}.{kind}"
            pictures.write(figure, path)
            found.setdefault(kind, set()).add(path.read_bytes())
    assert all(len(contents) == 1 for contents in found.values())
    with Image.open(tmp_path / "0.png") as image:
        assert image.size == (8 * style.DPI, math.ceil(5.6 * style.DPI))
    text = (tmp_path / "0.svg").read_text()
    for label in (">layer<", ">tokens<", ">MFLOPs<", ">without reduction<"):
        assert label in text


def test_a_file_of_another_kind_is_refused(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"expected one that ends in .png or .svg"):
        pictures.write(drawn["bars"], tmp_path / "x.jpg")


def test_missing_matplotlib_is_one_line(walk, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ValueError, match=r'matplotlib is not installed.*pip install "fambav\[viz\]"'
    ):
        pictures.maps(walk, title=TITLE)
