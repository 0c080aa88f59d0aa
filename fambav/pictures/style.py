"""How every picture looks: sizes, type, colours; and the one place that asks for matplotlib.

Type is never smaller than 11 points, nor than 1.8% of a picture's width, so that it can be read at
half size.  Colours are those of `groups.COLOURS`, and cividis for numbers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
MAP = "cividis"
INK, GREY, PALE = "#222222", "#767676", "#d9d9d9"
ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
)
LINES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, INK)
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
MARKS = ("o", "s", "^", "D", "v", "P", "X")

_LEAST, _SHARE = 11.0, 0.018
_LETTER = 0.54  # mean width of a letter, in units of its size
_NARROWEST = 6.3  # inches


def figure(width: float, height: float, *, pad: float = 0.05) -> Figure:
    """Return an empty picture.

    Args:
        width: In inches.
        height: In inches.
        pad: Room around axes, in inches.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            'matplotlib is not installed, expected it for pictures; pip install "fambav[viz]"'
        ) from None
    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    layout: Any = made.get_layout_engine()
    layout.set(w_pad=pad, h_pad=pad)
    return made


def type_size(figure: Figure) -> float:
    """Return the size of ordinary text, in points."""
    return float(max(_LEAST, _SHARE * 72 * figure.get_figwidth()))


def of(axes: Axes) -> Figure:
    """Return the picture that axes are part of."""
    found: Any = axes.get_figure(root=True)
    return cast("Figure", found)


def panels(
    count: int,
    *,
    columns: int,
    side: float,
    title: str,
    detail: str,
    lines: int = 1,
    more: tuple[float, float] = (0.0, 0.0),
) -> tuple[Figure, list[Axes]]:
    """Return a picture of equal squares below a title, and its axes in reading order.

    Args:
        count: Squares.
        columns: Most of them in a row.
        side: Width of a square with what surrounds it, in inches.
        title: As in `headed`.
        detail: As in `headed`.
        lines: Lines of text that belong to a square, above and below it.
        more: Further width and height, in inches, such as for a key.
    """
    rows = -(-count // columns)
    columns = -(-count // rows)
    width = max(columns * side, _NARROWEST) + more[0]
    size = max(_LEAST, _SHARE * 72 * width)
    line = 1.35 * size / 72
    head = len(_wrapped(title, width, size) + _wrapped(detail, width, size))
    height = head * line + rows * (side + lines * line + 0.05) + more[1]
    made = figure(width, height, pad=0.04)
    headed(made, title, detail)
    found = list(made.subplots(rows, columns, squeeze=False).flat)
    for unused in found[count:]:
        unused.remove()
    for axes in found[:count]:
        plain(axes, grid="")
    return made, found[:count]


def headed(on: Figure, title: str, detail: str = "") -> None:
    """Write a title, and details below it, wrapped to the width of the picture."""
    size = type_size(on)
    width = on.get_figwidth()
    lines = [*_wrapped(title, width, size), *_wrapped(detail, width, size)]
    on.suptitle("\n".join(lines), fontsize=size, x=0.01, ha="left", color=INK)


def plain(axes: Axes, *, grid: str = "y") -> None:
    """Give axes ticks that can be read, light lines along `grid`, and no box."""
    size = type_size(of(axes))
    axes.tick_params(labelsize=size, colors=INK)
    powers = (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text())
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title, *powers):
        label.set(fontsize=size, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=PALE, linewidth=0.8)  # type: ignore[arg-type]  # x, y or both


def name(axes: Axes, text: str) -> None:
    """Write a title above axes."""
    axes.set_title(text, fontsize=type_size(of(axes)), color=INK)


def empty(axes: Axes) -> None:
    """Take ticks and box from axes that hold an image."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def whole_ticks(axes: Axes) -> None:
    """Put ticks along x at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def line_style(number: int) -> dict[str, Any]:
    """Return colour, dashes and mark of curve `number`; no two of the first 84 are the same."""
    return {
        "color": LINES[number % len(LINES)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKS[number % len(MARKS)],
    }


def legend(on: Figure, marks: Sequence[Artist]) -> None:
    """Explain marks with labels below the picture, in as many columns as there is room for."""
    if not marks:
        return
    size = type_size(on)
    longest = max(len(str(mark.get_label())) for mark in marks)
    letters = on.get_figwidth() * 72 / (size * _LETTER)
    columns = max(1, min(len(marks), int(letters / (longest + 5))))
    on.legend(
        handles=list(marks),
        loc="outside lower left",
        ncols=columns,
        fontsize=size,
        frameon=False,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def labelled(axes: Axes) -> list[Artist]:
    """Return the marks of axes that have a label, if there are several."""
    marks: list[Artist] = list(axes.get_legend_handles_labels()[0])
    return marks if len(marks) > 1 else []


def _wrapped(text: str, width: float, size: float) -> list[str]:
    return textwrap.wrap(text, int(width * 72 / (size * _LETTER)))
