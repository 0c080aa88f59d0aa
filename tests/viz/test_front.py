"""Accuracy against cost, and names that can be read."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
from matplotlib.text import Text

from fambav.experiments.metrics import PRIMARY
from fambav.pareto import pareto_front
from fambav.viz import pareto, save
from fambav.viz.front import place_names


class Estimate(NamedTuple):
    mean: float
    std: float | None
    count: int


@dataclass
class Point:
    name: str
    method: str
    baseline: bool
    figures: dict[str, Estimate]
    phase: str = "scratch"


def points(count, *, seeds=3, keys=("seconds", "memory_mib", "flops", "token_layers"), seed=0):
    source = np.random.default_rng(seed)
    size = {"acc1": 100, "seconds": 60, "memory_mib": 20, "flops": 2e7, "token_layers": 1}
    std = 0.01 if seeds > 1 else None
    return [
        Point(
            name=f"row {number}" if number else "without fusion",
            method="none" if not number else ("famba-v", "ordered")[number % 2],
            baseline=not number,
            figures={
                key: Estimate(size[key] * source.uniform(0.5, 1), std and std * size[key], seeds)
                for key in ("acc1", *keys)
            },
        )
        for number in range(count)
    ]


def test_the_front_is_what_nothing_beats():
    costs, values = [1.0, 2.0, 2.0, 3.0, 4.0, 5.0], [10.0, 9.0, 12.0, 12.0, 15.0, 14.0]
    assert pareto_front(costs, values) == [0, 2, 4]
    assert pareto_front([1.0, 1.0], [5.0, 5.0]) == [0]
    for number in range(len(costs)):
        beaten = any(
            costs[n] <= costs[number] and values[n] >= values[number] and n != number
            for n in range(len(costs))
        )
        assert (number in pareto_front(costs, values)) == (not beaten)
    assert pareto_front(costs, [-value for value in values], higher_is_better=False) == [0, 2, 4]


def test_a_metric_may_be_one_of_which_less_is_better():
    error = PRIMARY._replace(name="mse", title="mean squared error", unit="m²")
    rows = points(5, keys=("seconds",))
    for row, value in zip(rows, (3.0, 1.0, 2.0, 4.0, 5.0), strict=True):
        row.figures |= {"mse": Estimate(value, None, 1), "seconds": Estimate(value, None, 1)}
    for higher, best in ((True, [1.0, 2.0, 3.0, 4.0, 5.0]), (False, [1.0])):
        (axes,) = pareto(rows, metric=error._replace(higher_is_better=higher), title="made up").axes
        (line,) = (line for line in axes.lines if line.get_gid() == "front")
        assert sorted(set(line.get_ydata())) == best
        assert axes.get_ylabel() == "mean squared error (m²)"


def boxes_of(figure):
    """Edges in pixels of the names beside points, by axes."""
    figure.draw_without_rendering()
    return [
        np.array([Text.get_window_extent(text).extents for text in axes.texts])
        for axes in figure.axes
    ]


@pytest.mark.parametrize("count", [5, 9, 14, 40])
def test_names_do_not_cover_each_other(count):
    figure = pareto(points(count), metric=PRIMARY, title="made up")
    named = boxes_of(figure)
    assert len(named) == 4
    for boxes in named:
        assert len(boxes) >= (count if count <= 16 else 2)
        wide = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        shared = (wide - low).clip(0).prod(axis=2)
        np.fill_diagonal(shared, 0)
        assert shared.max() < 4  # square pixels


def test_few_rows_are_named_and_many_have_numbers_with_a_key():
    few, many = (pareto(points(count), metric=PRIMARY, title="made up") for count in (5, 12))
    names = [f"row {number}" if number else "without fusion" for number in range(12)]
    assert sorted(t.get_text() for t in few.axes[0].texts) == sorted(names[:5])
    assert {t.get_text() for t in few.legends[0].texts} == {"none", "famba-v", "ordered"}
    assert sorted(int(t.get_text()) for t in many.axes[0].texts) == list(range(1, 13))
    key = [text.get_text() for text in many.legends[0].texts]
    assert key == [f"{number}  {name}" for number, name in enumerate(names, start=1)]


def legend(figure):
    """Colour, mark and text of each entry."""
    (key,) = figure.legends
    looks = [(h.get_color(), h.get_marker()) for h in key.legend_handles]
    return list(zip(looks, (text.get_text() for text in key.texts), strict=True))


@pytest.mark.parametrize(("count", "methods"), [(5, 1), (5, 2), (14, 1), (14, 2), (40, 1), (40, 2)])
def test_every_point_looks_as_the_entry_of_the_legend_that_stands_for_it(count, methods):
    rows = points(count, keys=("seconds",))
    for row in rows:
        row.method = row.method if row.baseline or methods == 2 else "ordered"
    figure = pareto(rows, title="made up")
    entries = legend(figure)
    assert len(entries) == len({text for _, text in entries})
    named = {text.split("  ")[-1]: look for look, text in entries}
    assert len({look for look, _ in entries}) == methods + 1
    for row, bars in zip(rows, figure.axes[0].containers, strict=True):
        look = bars.lines[0].get_color(), bars.lines[0].get_marker()
        if count == 5:
            assert named[row.method] == look
        else:
            assert named.get(row.name) or named[f"other rows of {row.method}"] == look
            assert named.get(row.name, look) == look
    if count == 14:
        assert named.keys() == {row.name for row in rows}


@pytest.mark.parametrize("count", [5, 16])
def test_a_line_leads_from_every_name_that_is_not_near_to_its_own_point(count):
    rows = points(count, seed=3)
    for row in rows:  # so close that names have to give way
        row.figures = {
            k: Estimate(e.mean if row.baseline else 0.3 * size, e.std, e.count)
            for (k, e), size in zip(row.figures.items(), (100, 60, 20, 2e7, 1), strict=True)
        }
    figure = pareto(rows, title="made up")
    led = 0
    for axes, boxes in zip(figure.axes, boxes_of(figure), strict=True):
        centre = axes.transData.transform(axes.containers[1].lines[0].get_xydata()[0])
        lines = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
        for text, (x0, y0, x1, y1) in zip(axes.texts, boxes, strict=True):
            if text.get_text() in ("1", "without fusion"):
                continue
            gap = np.hypot(*(np.clip(centre, (x0, y0), (x1, y1)) - centre))
            to = [line[1] for line in lines if len(line) == 2 and np.allclose(line[0], centre)]
            near = [np.clip(end, (x0, y0), (x1, y1)) - end for end in to]
            reached = any(np.hypot(*gap_left) < 6 for gap_left in near)
            assert reached or gap < y1 - y0
            led += reached
    assert led >= count


def test_a_name_has_the_colour_of_its_point_where_others_were_not_measured():
    rows = points(16)
    for row in rows:  # all but the first coincide
        if not row.baseline:
            row.figures = {key: Estimate(30.0, None, 1) for key in row.figures}
    del rows[1].figures["seconds"]
    axes = pareto(rows, title="made up").axes[0]
    drawn = [bars.lines[0].get_color() for bars in axes.containers]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    led = [line.get_color() for line in lines if np.allclose(line.get_xdata()[0], 30.0)]
    assert len(led) >= 3, "the last rows find no room beside their points"
    assert led == drawn[-len(led) :]


def test_of_many_rows_those_on_a_front_are_named():
    rows = points(30)
    figure = pareto(rows, title="made up")
    best = set()
    for key in ("seconds", "memory_mib", "flops", "token_layers"):
        chosen = pareto_front(
            [r.figures[key].mean for r in rows], [r.figures["acc1"].mean for r in rows]
        )
        best |= {rows[n].name for n in chosen}
    key = {text.get_text().split("  ")[-1] for text in figure.legends[0].texts}
    others = {"other rows of famba-v", "other rows of ordered"}
    assert key == best | {"without fusion"} | others


def test_points_stand_where_they_were_measured_with_their_spread():
    rows = points(3, keys=("token_layers",))
    (axes,) = pareto(rows, title="made up").axes
    assert axes.get_xlabel() == "tokens kept (% of token-layers)"
    for row, bars in zip(rows, axes.containers, strict=True):
        (line, _, (across, up)) = bars.lines
        x, y = 100 * row.figures["token_layers"].mean, row.figures["acc1"].mean
        np.testing.assert_allclose(line.get_xydata(), [[x, y]])
        np.testing.assert_allclose(across.get_segments(), [[[x - 1, y], [x + 1, y]]])
        np.testing.assert_allclose(up.get_segments(), [[[x, y - 1], [x, y + 1]]])


def test_the_front_is_a_line_of_steps():
    rows = points(3, keys=("seconds",), seeds=1)
    for row, (cost, value) in zip(rows, [(3, 9), (1, 5), (2, 7)], strict=True):
        row.figures = {"seconds": Estimate(cost, None, 1), "acc1": Estimate(value, None, 1)}
    figure = pareto(rows, title="made up")
    (line,) = [line for line in figure.axes[0].lines if line.get_gid() == "front"]
    assert line.get_xydata().tolist() == [[1, 5], [2, 5], [2, 7], [3, 7], [3, 9]]
    assert "one seed;" in figure.get_suptitle()


def test_only_what_was_measured_is_drawn():
    rows = points(4, keys=("seconds", "token_layers"))
    del rows[2].figures["seconds"]
    figure = pareto(rows, title="made up")
    assert [len(axes.containers) for axes in figure.axes] == [3, 4]
    with pytest.raises(
        ValueError, match="points have no figures, expected acc1 and one of seconds"
    ):
        pareto([Point("a", "none", True, {})], metric=PRIMARY, title="made up")


def test_axes_and_rows_stand_in_the_svg_as_text(tmp_path):
    path = tmp_path / "pareto.svg"
    save(pareto(points(5), title="made up"), path)
    text = path.read_text()
    for label in (
        "training time (s)",
        "peak memory in training (MiB)",
        "tokens kept (% of token-layers)",
    ):
        assert label in text
    assert "forward pass of one image (MFLOPs)" in text
    assert text.count(">row 3<") == 4


def test_type_can_be_read_at_half_size():
    figure = pareto(points(12), metric=PRIMARY, title="made up")
    figure.draw_without_rendering()
    least = max(11, 0.018 * 72 * figure.get_figwidth())
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    assert min(t.get_fontsize() for t in shown) >= least


def test_names_find_room_around_points_that_coincide():
    at = np.full((10, 2), 50.0)
    boxes = place_names(at, np.full((10, 2), (12.0, 6.0)), area=(0, 0, 100, 100), mark=4)
    assert (boxes >= 0).all()
    assert (boxes <= 100).all()
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            assert (np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])).min() <= 1e-9
