"""The style of every figure, and how it becomes a file; the one module that needs matplotlib.

Type is never smaller than 11 points, nor than 1.8% of a figure's width, so that it can be read at
half size.  Colours are those of `patches.COLOURS`, and cividis for numbers.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from fambav.arguments import file_path, instance, refusal
from fambav.engine.checkpoint import write_bytes
from fambav.text import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
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
_SECONDS = 0.9  # that a picture of a GIF is shown
# What matplotlib would write beside the picture: its version, and the time.
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}


def require_matplotlib() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError(
            'matplotlib is not installed, expected it for pictures; pip install "fambav[viz]"'
        ) from None


def figure(width: float, height: float, *, pad: float = 0.05) -> Figure:
    """Return an empty figure; sizes and the room around axes are in inches.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    layout: Any = made.get_layout_engine()
    layout.set(w_pad=pad, h_pad=pad)
    return made


def type_size(figure: Figure) -> float:
    """Return the size of ordinary text, in points."""
    return float(max(_LEAST, _SHARE * 72 * figure.get_figwidth()))


def figure_of(axes: Axes) -> Figure:
    """Return the figure that axes are part of."""
    return cast("Figure", cast(Any, axes).get_figure(root=True))


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
    """Return a figure of equal squares below a title, and their axes in reading order.

    Args:
        count: Squares, at most `columns` in a row.
        columns: See `count`.
        side: Width of a square and its surroundings, in inches.
        title: As in `headed`.
        detail: As in `headed`.
        lines: Lines of text above and below each square.
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
    return made, grid_of(made, count, columns)


def grid_of(on: Figure, count: int, columns: int) -> list[Axes]:
    """Return `count` axes of a figure in reading order, at most `columns` in a row."""
    columns = min(columns, count)
    axes = list(on.subplots(-(-count // columns), columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return axes[:count]


def headed(on: Figure, title: str, detail: str = "") -> None:
    """Write a title, and details below it, wrapped to the width of the figure."""
    size, width = type_size(on), on.get_figwidth()
    lines = [*_wrapped(title, width, size), *_wrapped(detail, width, size)]
    on.suptitle("\n".join(lines), fontsize=size, x=0.01, ha="left", color=INK)


def plain(axes: Axes, *, grid: str = "") -> None:
    """Give axes ticks that can be read, light lines along `grid` (x, y or both), and no box."""
    size = type_size(figure_of(axes))
    axes.tick_params(labelsize=size, colors=INK)
    powers = (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text())
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title, *powers):
        label.set(fontsize=size, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=PALE, linewidth=0.8)  # type: ignore[arg-type]


def picture(axes: Axes, title: str) -> None:
    """Give axes that hold an image a title, and neither ticks nor a box."""
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)
    plain(axes)


def whole_ticks(axes: Axes) -> None:
    """Put ticks along x at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def line_style(number: int) -> dict[str, Any]:
    """Return colour, dashes and mark of curve `number`; no two of the first 28 are the same."""
    return {
        "color": LINES[number % len(LINES)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKS[number % len(MARKS)],
        "markersize": 5,
    }


def literal(text: str) -> str:
    """Return text that matplotlib draws as it is: names are no mathematics."""
    return printable(text).replace("$", r"\$")


def legend(on: Figure, marks: Sequence[Artist]) -> None:
    """Explain marks with labels below the figure, in as many columns as there is room for."""
    if not marks:
        return
    size = type_size(on)
    for mark in marks:
        mark.set_label(literal(str(mark.get_label())))
    longest = max(len(str(mark.get_label())) for mark in marks)
    letters = on.get_figwidth() * 72 / (size * _LETTER)
    on.legend(
        handles=list(marks),
        loc="outside lower left",
        ncols=max(1, min(len(marks), int(letters / (longest + 5)))),
        fontsize=size,
        frameon=False,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def key(on: Figure, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Explain lines or marks, each with its label, below the figure."""
    from matplotlib.lines import Line2D

    legend(on, [Line2D([], [], label=label, **style) for label, style in entries])


def labelled(axes: Axes) -> list[Artist]:
    """Return the marks of axes that have a label, if there are several."""
    marks: list[Artist] = list(axes.get_legend_handles_labels()[0])
    return marks if len(marks) > 1 else []


def save(drawn: Figure | Sequence[Figure], path: Path) -> None:
    """Write a figure, or several of one size as an animation; equal ones give equal bytes.

    Args:
        drawn: The figure, or those of an animation, which begins again; its last one stays longer.
        path: Ends in .png or .svg, and of an animation in .gif; text in SVG is text.

    Raises:
        ValueError: If the path ends otherwise, or there is no figure.
        OSError: If it cannot be written.
    """
    path = file_path("path", path)
    if isinstance(drawn, Sequence):
        _save_gif(drawn, path)
        return
    if path.suffix not in _METADATA:
        raise ValueError(f"path is {str(path)!r}, expected one that ends in .png or .svg")
    import matplotlib
    from matplotlib.figure import Figure

    instance("drawn", drawn, Figure, "a figure, or several of one size")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fambav"}):
        kind = path.suffix.removeprefix(".")
        drawn.savefig(buffer, format=kind, metadata=_METADATA[path.suffix])
    write_bytes(path, buffer.getbuffer())


def _save_gif(drawn: Sequence[Figure], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not drawn:
        raise refusal("drawn", drawn, "at least one figure")
    if path.suffix != ".gif":
        raise ValueError(f"path is {str(path)!r}, expected one that ends in .gif")
    frames = []
    for each in drawn:
        canvas = FigureCanvasAgg(each)
        canvas.draw()
        pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        frames.append(pixels.quantize(256, dither=Image.Dither.NONE))
    time, buffer = int(1000 * _SECONDS), io.BytesIO()
    frames[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[time] * (len(frames) - 1) + [3 * time],
        loop=0,
    )
    write_bytes(path, buffer.getbuffer())


def _wrapped(text: str, width: float, size: float) -> list[str]:
    return textwrap.wrap(literal(text), int(width * 72 / (size * _LETTER)))
