"""A metric against what it costs, over the rows of a grid, and which rows nothing beats.

A row is on the front if no other is at least as good at no higher cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fambav.pictures import style
from fambav.pictures.labels import placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPELLED = 5  # most rows whose names stand in the picture; of more, numbers do
_NAMED = 16  # most rows that all have a number; of more, those on a front
_FRONT = "front"

Look = Mapping[str, tuple[str, str]]  # colour and mark of each row by its name


class Estimate(Protocol):
    """A figure over several seeds: its mean, and its standard deviation unless there is one."""

    @property
    def count(self) -> int:
        """Seeds."""

    @property
    def mean(self) -> float:
        """Mean."""

    @property
    def std(self) -> float | None:
        """Sample standard deviation, None with one seed."""


class Point(Protocol):
    """A row of a grid, such as `fambav.experiments.points` returns."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def method(self) -> str:
        """Method of reduction; if there are several, rows of one have one colour."""

    @property
    def baseline(self) -> bool:
        """Whether it is the row without reduction."""

    @property
    def phase(self) -> str:
        """What the figures are of, such as fine-tuned."""

    @property
    def figures(self) -> Mapping[str, Estimate]:
        """What was measured, by its key."""


class Metric(Protocol):
    """What rows are compared by, such as `fambav.experiments.PRIMARY`."""

    @property
    def name(self) -> str:
        """Its key among the figures of a point."""

    @property
    def title(self) -> str:
        """What it is called."""

    @property
    def unit(self) -> str:
        """Of its figures."""

    @property
    def higher_is_better(self) -> bool:
        """Which of two figures wins."""


class Axis(NamedTuple):
    """A cost.

    Attributes:
        key: Of the figures of a point.
        label: With the unit.
        unit: What the figures are divided by.
    """

    key: str
    label: str
    unit: float = 1.0


AXES = (
    Axis("seconds", "training time (s)"),
    Axis("memory_mib", "peak memory in training (MiB)"),
    Axis("flops", "forward pass of one image (MFLOPs)", 1e6),
    Axis("token_layers", "token-layers left (%)", 0.01),
)


def front(
    costs: Sequence[float], values: Sequence[float], *, higher_is_better: bool = True
) -> list[int]:
    """Return which of several are on the front, by growing cost; of equals the first."""
    gains = values if higher_is_better else [-value for value in values]
    order = sorted(range(len(costs)), key=lambda n: (costs[n], -gains[n], n))
    found: list[int] = []
    for number in order:
        if not found or gains[number] > gains[found[-1]]:
            found.append(number)
    return found


def pareto(points: Sequence[Point], *, metric: Metric, title: str, detail: str = "") -> Figure:
    """Draw a metric against every cost that was measured.

    Args:
        points: Rows measured on the same hardware.
        metric: The metric.
        title: What grid they are of.
        detail: Such as what memory counts.

    Raises:
        ValueError: If no row has the metric and a cost.
    """
    known = [point for point in points if metric.name in point.figures]
    shown = [axis for axis in AXES if any(axis.key in point.figures for point in known)]
    if not shown:
        costs = ", ".join(axis.key for axis in AXES)
        raise ValueError(f"points have no figures, expected {metric.name} and one of {costs}")
    names, look = _named(known, shown, metric), _colours(known)
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = style.figure(5.6 * columns, 4.2 * rows + 1.0 + 0.1 * len(names))
    seeds = sorted({point.figures[metric.name].count for point in known})
    over = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seeds"
    told = "one seed" if seeds == [1] else f"mean and standard deviation over {over}"
    told += "; line: rows that no other row beats"
    style.headed(figure, title, f"{told}{'; ' if detail else ''}{detail}")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, axis in zip(panels, shown, strict=False):
        _draw(axes, axis, metric, known, look)
    for unused in panels[len(shown) :]:
        unused.remove()
    _key(figure, known, names, look)
    figure.draw_without_rendering()  # only then is it known where points are
    for axes, axis in zip(panels, shown, strict=False):
        there = [point for point in known if axis.key in point.figures]
        _name(axes, axis, metric, there, names, look)
    return figure


def _xy(point: Point, axis: Axis, metric: Metric) -> tuple[float, float]:
    return point.figures[axis.key].mean / axis.unit, point.figures[metric.name].mean


def _named(points: Sequence[Point], shown: Sequence[Axis], metric: Metric) -> dict[str, str]:
    """Return what is written beside the rows that have something beside them."""
    if len(points) <= _SPELLED:
        return {point.name: point.name for point in points}
    if len(points) <= _NAMED:
        return {point.name: str(number) for number, point in enumerate(points, start=1)}
    chosen = {point.name for point in points if point.baseline}
    for axis in shown:
        there = [point for point in points if axis.key in point.figures]
        x, y = zip(*(_xy(point, axis, metric) for point in there), strict=True)
        best = front(x, y, higher_is_better=metric.higher_is_better)
        chosen |= {there[number].name for number in best}
    names = [point.name for point in points if point.name in chosen]
    return {name: str(number) for number, name in enumerate(names, start=1)}


def _colours(points: Sequence[Point]) -> Look:
    """Return colour and mark of each row by its name, a black star for what has no reduction."""
    methods = list(dict.fromkeys(point.method for point in points if not point.baseline))
    kinds = {p.name: p.method if len(methods) > 1 else p.name for p in points if not p.baseline}
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds.values()))}
    look = {
        name: (style.LINES[numbers[kind] % 6], style.MARKS[numbers[kind] % len(style.MARKS)])
        for name, kind in kinds.items()
    }
    return look | {point.name: (style.INK, "*") for point in points if point.baseline}


def _draw(axes: Axes, axis: Axis, metric: Metric, points: Sequence[Point], look: Look) -> None:
    there = [point for point in points if axis.key in point.figures]
    x, y = zip(*(_xy(point, axis, metric) for point in there), strict=True)
    best = front(x, y, higher_is_better=metric.higher_is_better)
    corners = [(x[n], y[before]) for before, n in pairwise(best)]
    ends = [(x[n], y[n]) for n in best]
    way = [ends[0], *chain.from_iterable(zip(corners, ends[1:], strict=True))]
    axes.plot(*zip(*way, strict=True), color=style.GREY, lw=1.2, zorder=1, gid=_FRONT)
    for point, across, up in zip(there, x, y, strict=True):
        colour, mark = look[point.name]
        wide, high = point.figures[axis.key].std, point.figures[metric.name].std
        axes.errorbar(
            across,
            up,
            xerr=None if wide is None else wide / axis.unit,
            yerr=high,
            color=colour,
            marker=mark,
            markersize=11 if mark == "*" else 6.5,
            elinewidth=0.9,
            alpha=0.9,
        )
    axes.set(xlabel=axis.label, ylabel=f"{metric.title} ({metric.unit})")
    axes.margins(0.12)
    style.plain(axes, grid="both")


def _name(
    axes: Axes,
    axis: Axis,
    metric: Metric,
    points: Sequence[Point],
    names: Mapping[str, str],
    look: Look,
) -> None:
    """Write names beside points, with a thin line of its colour to a point that is not near."""
    ordered = sorted(points, key=lambda point: point.name not in names)
    named = [point for point in ordered if point.name in names]
    at = np.array([_xy(point, axis, metric) for point in ordered])
    size, dpi = style.type_size(style.of(axes)), style.of(axes).dpi
    pixel = size * dpi / 72
    sizes = np.array([(pixel * (0.56 * len(names[p.name]) + 0.3), 1.1 * pixel) for p in named])
    box = axes.get_window_extent()
    (line,) = (line for line in axes.lines if line.get_gid() == _FRONT)
    way = _along(axes.transData.transform(line.get_xydata()), 0.5 * pixel)
    boxes = placed(
        np.concatenate((axes.transData.transform(at), way)),
        sizes,
        area=(box.x0, box.y0, box.x1, box.y1),
        mark=8 * dpi / 72,
    )
    back = axes.transData.inverted()
    for point, start, (x0, y0, x1, y1) in zip(
        named, axes.transData.transform(at), boxes, strict=False
    ):
        x, y = back.transform(((x0 + x1) / 2, (y0 + y1) / 2))
        written = axes.text(x, y, names[point.name], fontsize=size, ha="center", va="center")
        written.set_in_layout(False)  # or axes would move, and points with them
        edge = np.clip(start, (x0, y0), (x1, y1))
        if np.hypot(*(edge - start)) > pixel:
            way = back.transform((start, edge)).T
            axes.plot(*way, color=look[point.name][0], lw=0.7, scalex=False, scaley=False)


def _along(corners: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Return points along a line at most `step` apart, (points, 2)."""
    found = [corners[:1]]
    for start, end in pairwise(corners):
        many = int(np.abs(end - start).max() // step) + 1
        found.append(start + (end - start) * np.linspace(0, 1, many + 1)[1:, None])
    return np.concatenate(found)


def _key(figure: Figure, points: Sequence[Point], names: Mapping[str, str], look: Look) -> None:
    """Explain numbers and colours below the picture."""
    from matplotlib.lines import Line2D

    lines = {
        p.method if names.get(p.name) == p.name else f"{names[p.name]}  {p.name}": look[p.name]
        for p in points
        if p.name in names
    }
    lines |= {f"other rows of {p.method}": look[p.name] for p in points if p.name not in names}
    marks = [
        Line2D([], [], color=colour, marker=mark, linestyle="", label=name)
        for name, (colour, mark) in lines.items()
    ]
    style.legend(figure, marks)
