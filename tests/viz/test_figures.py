"""What is to be seen in each figure."""

import math
import sys

import numpy as np
import pytest
import timm
import torch
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from PIL import Image

import fambav
import fambav.models
from fambav import flops, viz
from fambav.viz import style
from fambav.viz.patches import spread

IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
TITLE = "vim_micro, ordered, 4 tokens at layers 1-3: made up, held-out image 0, labelled 3"


def made(method="prune-aligned", schedule="r:4@2-3", **arguments):
    torch.manual_seed(0)
    model = timm.create_model("vim_micro", num_classes=3, img_size=16, depth=3, **arguments)
    return fambav.reduce(model, method, schedule)


def log(*, epochs=4, ema=True):
    more = {"test_ema_acc1": 50.0} if ema else {}
    lines = [dict(test_acc1=10.0 * e, test_loss=2.0, train_loss=1.0) for e in range(epochs)]
    return [{"epoch": e, "train_lr": 1e-3, **line, **more} for e, line in enumerate(lines)]


def every():
    found = {name: getattr(viz, name)(made(), IMAGE, title=TITLE) for name in NAMES[:5]}
    found["layers"] = viz.layers(made(), title=TITLE)
    found["curves"] = viz.curves({"a": log(), "b": log(epochs=1)}, title=TITLE)
    found["frame"] = viz.animation(made(), IMAGE, title=TITLE)[-1]
    return found


NAMES = (
    "groups",
    "strategies",
    "similarity",
    "mean_similarity",
    "scan",
    "layers",
    "curves",
    "frame",
)


@pytest.fixture(scope="module")
def drawn():
    figures = every()
    for figure in figures.values():
        figure.draw_without_rendering()
    return figures


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


def heading(figure):
    return " ".join(figure.get_suptitle().split())


def test_groups_are_shown_at_the_start_and_behind_each_layer(drawn):
    assert titles(drawn["groups"]) == [
        "input: 17 tokens",
        "layer 1: 17 tokens",
        "layer 2: 13 tokens",
        "layer 3: 9 tokens",
    ]
    assert "crossed patches were dropped" in heading(drawn["groups"])
    crosses = drawn["groups"].axes[-1].collections[-1].get_segments()
    assert len(crosses) == 2 * 8
    last = titles(viz.groups(made(), IMAGE, layers=[3]))
    assert [title.split(":")[0] for title in last] == ["input", "layer 3"]


@pytest.mark.parametrize("kind", ["groups", "animation"])
def test_lines_between_the_parts_of_a_token_are_explained_where_there_are_some(kind):
    told = []
    for method in ("famba-v", "prune-aligned"):  # the second fuses nothing
        found = getattr(viz, kind)(made(method), IMAGE)
        figure = found[-1] if kind == "animation" else found
        axes = figure.axes[3 if kind == "groups" else 0]
        (dots,) = (found for found in axes.collections if isinstance(found, PathCollection))
        told.append("lines with dots at their ends join the parts of one token" in heading(figure))
        assert told[-1] == bool(len(dots.get_offsets()))
    assert told == [True, False]


def rows(figure):
    labels = [axes.yaxis.label for axes in figure.axes if axes.get_ylabel()]
    bold = [label.get_text().split("\n")[0] for label in labels if label.get_weight() == "bold"]
    return [label.get_text() for label in labels], bold


@pytest.mark.parametrize(
    ("model", "own", "last"),
    [
        (("ordered", "r:4@2-3"), "upper", "upper\nL = 2, r = 4\n(this run)\n76%"),
        (("ordered", "r:2@3"), "this run", "this run\n2 tokens\nat layer 3\n96%"),
        (("none", "r:0"), "none", "upper\nL = 2, r = 5\n71%"),
    ],
)
def test_strategies_are_rows_with_their_l_and_r_and_share_and_the_runs_own_is_marked(
    model, own, last
):
    labels, bold = rows(viz.strategies(made(*model), IMAGE))
    assert labels[-1] == last
    assert bold == [own]
    kinds = ["none", "all", "interleaved", "lower", "upper", "this run"]
    assert [label.split("\n")[0] for label in labels] == kinds[: 6 if own == "this run" else 5]
    kept = "r = 1\n88%" if own == "this run" else "r = "
    assert kept in labels[1]
    assert all("r = " in label for label in labels[1:5])
    assert ["L = " in label for label in labels[:5]] == [False] * 3 + [True] * 2


def test_the_first_row_of_strategies_names_the_layers_and_all_give_their_tokens(drawn):
    assert titles(drawn["strategies"])[:4] == ["layer 1: 17", "layer 2: 17", "layer 3: 17", "14"]
    assert "percentages: tokens kept, of all token-layers" in heading(drawn["strategies"])


def test_layers_are_as_high_as_the_numbers(drawn):
    rows = [row for row in flops.count(made()).rows if row.layer is not None]
    full = [row.own.all_directions for row in flops.count(made("none")).rows if row.layer]
    own = [row.own.all_directions for row in rows]
    more = [row.alignment.all_directions + row.reduction.all_directions for row in rows]
    tokens, operations = drawn["layers"].axes
    heights = [[bar.get_height() for bar in group] for group in tokens.containers]
    assert heights == [[17, 17, 17], [17, 17, 13]]
    found = [[bar.get_height() for bar in group] for group in operations.containers]
    np.testing.assert_allclose(found, 1e-6 * np.array([full, own, more]))
    assert [bar.get_y() for bar in operations.containers[2]] == found[1]  # one upon the other
    assert operations.get_ylabel() == "MFLOPs"
    share = 100 * (sum(own) + sum(more)) / sum(full)
    told = f"tokens kept: 92% of token-layers; operations: {share:.0f}% of those without reduction"
    assert told in heading(drawn["layers"])


def test_cosine_maps_share_one_scale(drawn):
    images = [image for axes in drawn["similarity"].axes for image in axes.images]
    assert [image.get_array().shape for image in images] == [(17, 17), (17, 17), (13, 13)]
    assert len({image.get_clim() for image in images}) == 1
    assert images[0].get_clim()[1] == 1


def test_curves_show_every_run_and_leave_out_what_none_has():
    figure = viz.curves({"a": log(ema=False), "b": log(ema=False, epochs=2)}, title=TITLE)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["top-1 accuracy (%)", "loss", "loss", "learning rate"]
    first, second = figure.axes[0].lines
    assert first.get_xydata().tolist() == [[1, 0], [2, 10], [3, 20], [4, 30]]
    assert len(second.get_xydata()) == 2
    assert [t.get_text() for t in figure.legends[0].texts] == ["a", "b"]
    with pytest.raises(ValueError, match="logs have none of test_acc1"):
        viz.curves({"a": [{"epoch": 0}]}, title=TITLE)


def test_the_metric_is_drawn_by_time_where_every_epoch_has_its_own():
    timed = [{**record, "train_seconds": 90.0} for record in log(ema=False)]
    last = viz.curves({"a": timed, "b": timed[:2]}, title=TITLE).axes[-1]
    assert last.get_xlabel() == "minutes of training"
    assert last.lines[0].get_xydata().tolist() == [[1.5, 0], [3, 10], [4.5, 20], [6, 30]]
    assert len(last.lines[1].get_xydata()) == 2
    for figure in (
        viz.curves({"a": timed, "b": log(ema=False)}, title=TITLE),
        viz.curves({"a": timed}, title=TITLE, timed=False),
    ):
        assert {axes.get_xlabel() for axes in figure.axes} == {"epoch, from 1"}


def test_no_two_panels_of_curves_have_one_name_and_each_says_where_epochs_begin(drawn):
    names = titles(drawn["curves"])
    assert len({*names}) == len(names) == 5
    assert {axes.get_xlabel() for axes in drawn["curves"].axes} == {"epoch, from 1"}
    assert "epochs count from 1 here, from 0 in log.txt" in heading(drawn["curves"])


def test_no_two_curves_look_alike():
    looks = [str(style.line_style(number)) for number in range(28)]
    assert len(set(looks)) == 28


def test_layers_are_spread_evenly_up_to_the_last():
    assert spread(6, 11) == [1, 2, 3, 4, 5, 6]
    assert spread(24, 6) == [4, 8, 12, 16, 20, 24]
    assert spread(7, 3)[-1] == 7


def test_an_animation_has_a_figure_for_the_start_and_each_layer(tmp_path):
    path = tmp_path / "made.gif"
    viz.save(viz.animation(made(), IMAGE, title=TITLE), path)
    with Image.open(path) as animation:
        assert animation.format == "GIF"
        assert animation.n_frames == 4
        durations = []
        for number in range(4):
            animation.seek(number)
            durations.append(animation.info["duration"])
    assert durations == [900, 900, 900, 2700]


def test_files_have_their_format_and_size_and_always_the_same_bytes(tmp_path):
    for kind in ("png", "svg"):
        for number in range(2):
            viz.save(viz.layers(made()), tmp_path / f"{number}.{kind}")
        assert len({(tmp_path / f"{number}.{kind}").read_bytes() for number in range(2)}) == 1
    with Image.open(tmp_path / "0.png") as image:
        assert image.size == (8 * style.DPI, math.ceil(5.6 * style.DPI))
    text = (tmp_path / "0.svg").read_text()
    for label in (">layer<", ">tokens<", ">MFLOPs<", ">without reduction<"):
        assert label in text


def test_a_file_of_another_kind_is_refused(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"expected one that ends in .png or .svg"):
        viz.save(drawn["layers"], tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"expected one that ends in .gif"):
        viz.save([drawn["layers"]], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_trace_stands_for_its_image_and_models_stay_as_they_are():
    model = made()
    own, trace = model.reduction, viz.trace_tokens(model, IMAGE)
    for name in NAMES[:5]:
        one, other = (getattr(viz, name)(model, given) for given in (IMAGE, trace))
        assert one.get_suptitle() == other.get_suptitle()
        assert len(one.axes) == len(other.axes)
        assert heading(one).startswith("vim_micro")
    assert model.reduction is own
    assert model.training


def test_missing_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ValueError, match=r'matplotlib is not installed.*pip install "fambav\[viz\]"'
    ):
        viz.scan(made(), IMAGE)
