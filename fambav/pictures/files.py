"""Pictures as files: the same picture gives the same bytes, whenever it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What else matplotlib would write: its version, and the time.
_SILENT: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}


def write(figure: Figure, path: Path) -> None:
    """Write a picture.

    Args:
        figure: The picture.
        path: Ends in .png or .svg; text in SVG is text, to be searched and edited.

    Raises:
        ValueError: If the path ends otherwise.
        OSError: If it cannot be written.
    """
    if path.suffix not in _SILENT:
        raise ValueError(f"path is {str(path)!r}, expected one that ends in {' or '.join(_SILENT)}")
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fambav"}):
        figure.savefig(path, metadata=_SILENT[path.suffix])


def animate(frames: Sequence[NDArray[np.uint8]], path: Path, *, seconds: float = 0.9) -> None:
    """Write pictures one after the other as a GIF that begins again; the last one stays longer.

    Args:
        frames: At least one, no two in a row equal, each (height, width, 3).
        path: Ends in .gif.
        seconds: How long each is shown.

    Raises:
        OSError: If it cannot be written.
    """
    first, *rest = (
        Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames
    )
    each = int(1000 * seconds)
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=rest,
        duration=[each] * len(rest) + [3 * each],
        loop=0,
    )
