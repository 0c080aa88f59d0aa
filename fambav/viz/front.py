"""The Pareto front of a grid: a metric against a cost, and the rows that no other beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fambav.arguments import instance
from fambav.experiments import Point
from fambav.experiments.metrics import PRIMARY
from fambav.pareto import pareto_front
from fambav.tasks import Metric
from fambav.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Boxes = NDArray[np.float64]  # left, lower, right and upper edges, (boxes, 4)
Markers = Mapping[str, tuple[str, str]]  # colour and mark of each row, by its name

_SPELLED = 5  # most rows whose names stand in the figure; of more, numbers do
_NAMED = 16  # most rows that all have a number; of more, those on a front
_FRONT = "front"
_AROUND = 2 * np.pi * np.arange(16) / 16  # directions in which there may be room
_RADII = (0.9, 1.5, 2.2, 3.0, 4.0, 5.2, 6.6, 8.2, 10.0)  # how far away, in heights of a name


class Axis(NamedTuple):
    """A cost: its key among the figures of a point, its label, and what figures are divided by."""

    key: str
    label: str
    unit: float = 1.0

    def of(self, points: Sequence[Point]) -> list[Point]:
        """Return the points of which it was measured."""
        return [point for point in points if self.key in point.figures]


AXES = (
    Axis("seconds", "training time (s)"),
    Axis("memory_mib", "peak memory in training (MiB)"),
    Axis("flops", "forward pass of one image (MFLOPs)", 1e6),
    Axis("token_layers", "tokens kept (% of token-layers)", 0.01),
)


def pareto(
    points: Sequence[Point], *, title: str, detail: str = "", metric: Metric = PRIMARY
) -> Figure:
    """Draw a metric against every cost that was measured.

    Args:
        points: Rows measured on the same hardware.
        title: What grid they are of.
        detail: Such as what memory counts.
        metric: What is drawn upwards.

    Raises:
        ValueError: If no row has the metric and a cost.
    """
    instance("points", points, Sequence, "a list of points")
    known = [point for point in points if metric.name in point.figures]
    measured = [axis for axis in AXES if axis.of(known)]
    if not measured:
        keys = ", ".join(axis.key for axis in AXES)
        raise ValueError(f"points have no figures, expected {metric.name} and one of {keys}")
    names, markers = _names(known, measured, metric), _markers(known)
    columns = min(2, len(measured))
    height = 4.2 * -(-len(measured) // columns) + 1.0 + 0.1 * len(names)
    figure = style.figure(5.6 * columns, height)
    seeds = sorted({point.figures[metric.name].count for point in known})
    over = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seeds"
    note = "one seed" if seeds == [1] else f"mean and standard deviation over {over}"
    note += "; line: Pareto front"
    style.headed(figure, title, f"{note}{'; ' if detail else ''}{detail}")
    panels = style.grid_of(figure, len(measured), columns)
    for axes, axis in zip(panels, measured, strict=True):
        _draw(axes, axis, metric, axis.of(known), markers)
    _explain(figure, known, names, markers)
    figure.draw_without_rendering()  # only then is it known where points are
    for axes, axis in zip(panels, measured, strict=True):
        _write_names(axes, axis, metric, axis.of(known), names, markers)
    return figure


def _at(points: Sequence[Point], axis: Axis, metric: Metric) -> NDArray[np.float64]:
    """Return where points stand, (points, 2)."""
    pairs = [(p.figures[axis.key].mean / axis.unit, p.figures[metric.name].mean) for p in points]
    return np.array(pairs)


def _front(points: Sequence[Point], axis: Axis, metric: Metric) -> list[int]:
    costs, values = _at(points, axis, metric).T.tolist()
    return pareto_front(costs, values, higher_is_better=metric.higher_is_better)


def _names(points: Sequence[Point], measured: Sequence[Axis], metric: Metric) -> dict[str, str]:
    """Return what is written beside the rows that have something beside them."""
    if len(points) <= _SPELLED:
        return {point.name: point.name for point in points}
    chosen = {point.name for point in points if point.baseline or len(points) <= _NAMED}
    for axis in measured:
        there = axis.of(points)
        chosen |= {there[number].name for number in _front(there, axis, metric)}
    names = [point.name for point in points if point.name in chosen]
    return {name: str(number) for number, name in enumerate(names, start=1)}


def _markers(points: Sequence[Point]) -> Markers:
    """Return the colour and marker of each row's method, a black star for the baseline."""
    methods = list(dict.fromkeys(point.method for point in points if not point.baseline))
    styles = [(style.LINES[n % 6], style.MARKS[n % len(style.MARKS)]) for n in range(len(methods))]
    return {
        point.name: (style.INK, "*") if point.baseline else styles[methods.index(point.method)]
        for point in points
    }


def _draw(
    axes: Axes, axis: Axis, metric: Metric, points: Sequence[Point], markers: Markers
) -> None:
    at, best = _at(points, axis, metric), _front(points, axis, metric)
    ends = [tuple(at[number]) for number in best]
    corners = [(at[n][0], at[before][1]) for before, n in pairwise(best)]
    way = [ends[0], *chain.from_iterable(zip(corners, ends[1:], strict=True))]
    axes.plot(*zip(*way, strict=True), color=style.GREY, lw=1.2, zorder=1, gid=_FRONT)
    for point, (x, y) in zip(points, at, strict=True):
        colour, mark = markers[point.name]
        wide = point.figures[axis.key].std
        axes.errorbar(
            x,
            y,
            xerr=None if wide is None else wide / axis.unit,
            yerr=point.figures[metric.name].std,
            color=colour,
            marker=mark,
            markersize=11 if mark == "*" else 6.5,
            elinewidth=0.9,
            alpha=0.9,
        )
    axes.set(xlabel=axis.label, ylabel=f"{metric.title} ({metric.unit})")
    axes.margins(0.12)
    style.plain(axes, grid="both")


def _explain(
    figure: Figure, points: Sequence[Point], names: Mapping[str, str], markers: Markers
) -> None:
    """List every number with its row, and every method whose rows have no number."""
    entries = []
    for point in points:
        number = names.get(point.name, f"other rows of {point.method}")
        label = point.method if number == point.name else number
        label += f"  {point.name}" if number != point.name and point.name in names else ""
        entries.append((label, markers[point.name]))
    style.key(
        figure,
        [(n, {"color": c, "marker": m, "linestyle": ""}) for n, (c, m) in dict.fromkeys(entries)],
    )


def _write_names(
    axes: Axes,
    axis: Axis,
    metric: Metric,
    points: Sequence[Point],
    names: Mapping[str, str],
    markers: Markers,
) -> None:
    """Write names beside points, with a thin line of its colour to a point that is not near."""
    ordered = sorted(points, key=lambda point: point.name not in names)
    named = [point for point in ordered if point.name in names]
    size, dpi = style.type_size(style.figure_of(axes)), style.figure_of(axes).dpi
    pixel, box = size * dpi / 72, axes.get_window_extent()
    sizes = np.array([(pixel * (0.56 * len(names[p.name]) + 0.3), 1.1 * pixel) for p in named])
    (line,) = (line for line in axes.lines if line.get_gid() == _FRONT)
    way = _along(axes.transData.transform(line.get_xydata()), 0.5 * pixel)
    at = axes.transData.transform(_at(ordered, axis, metric))
    area = (box.x0, box.y0, box.x1, box.y1)
    boxes = place_names(np.concatenate((at, way)), sizes, area=area, mark=8 * dpi / 72)
    back = axes.transData.inverted()
    for point, start, (x0, y0, x1, y1) in zip(named, at, boxes, strict=False):
        x, y = back.transform(((x0 + x1) / 2, (y0 + y1) / 2))
        name = style.literal(names[point.name])
        written = axes.text(x, y, name, fontsize=size, ha="center", va="center")
        written.set_in_layout(False)  # or axes would move, and points with them
        edge = np.clip(start, (x0, y0), (x1, y1))
        if np.hypot(*(edge - start)) > 0.75 * pixel:
            ends = back.transform((start, edge)).T
            axes.plot(*ends, color=markers[point.name][0], lw=0.7, scalex=False, scaley=False)


def _along(corners: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Return points along a line at most `step` apart, (points, 2)."""
    pieces = [corners[:1]]
    for start, end in pairwise(corners):
        many = int(np.abs(end - start).max() // step) + 1
        pieces.append(start + (end - start) * np.linspace(0, 1, many + 1)[1:, None])
    return np.concatenate(pieces)


def place_names(
    points: NDArray[np.float64], sizes: NDArray[np.float64], *, area: Sequence[float], mark: float
) -> Boxes:
    """Find room for a name beside each point: the nearest that touches no name, point or edge.

    Where there is no room at all, a name covers as few others as possible.

    Args:
        points: x and y, (points, 2); those without a name come last.
        sizes: Width and height of the names in the same unit, (names, 2).
        area: Left, lower, right and upper edge.
        mark: Side of the square that a point's mark fills.

    Returns:
        The boxes of the names, (names, 4).
    """
    marks = np.concatenate((points - mark / 2, points + mark / 2), axis=1)
    inside, placed = np.array([area], dtype=np.float64), np.empty((0, 4))
    for point, size in zip(points, sizes, strict=False):
        options = _options(point, size, mark)
        outside = size.prod() - _shared(options, inside)
        cost = 1000.0 * (outside + _shared(options, placed)) + _shared(options, marks)
        placed = np.concatenate((placed, options[int(np.argmin(cost))][None]))
    return placed


def _options(point: NDArray[np.float64], size: NDArray[np.float64], mark: float) -> Boxes:
    """Return boxes at growing distance around a point, the right one first."""
    reach = 0.5 * (mark + np.array(_RADII)[:, None, None] * size[1] + size)
    centre = point + np.stack((np.cos(_AROUND), np.sin(_AROUND)), axis=1) * reach
    return np.concatenate((centre - size / 2, centre + size / 2), axis=2).reshape(-1, 4)


def _shared(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Return the area that each box has in common with all others together, (boxes,)."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    sides = (np.minimum(boxes[:, None, 2:], others[:, 2:]) - low).clip(0)
    area: NDArray[np.float64] = sides.prod(axis=2).sum(axis=1)
    return area
