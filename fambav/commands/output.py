"""What commands print and write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from fambav.config import ConfigError
from fambav.text import printable


def check_files(*files: Path | None) -> None:
    """Refuse files that could not be written, before any work is done.

    Raises:
        ConfigError: If a folder is missing or read-only, or a file is a folder.
    """
    for file in files:
        if file is None:
            continue
        if file.is_dir():
            raise ConfigError(f"file is {str(file)!r}, expected no folder of that name")
        if not file.parent.is_dir():
            raise ConfigError(f"folder is {str(file.parent)!r}, expected one that exists")
        place = file if file.exists() and not file.is_file() else file.parent  # such as /dev/stdout
        if not os.access(place, os.W_OK):
            raise ConfigError(f"output is {str(place)!r}, expected one that can be written to")


def print_line(line: str, stream: TextIO | None = None) -> None:
    """Print a line at once, whatever is in the names that it is made of."""
    print(printable(line), file=stream, flush=True)


def show(text: str, figures: str, target: Path | None) -> None:
    """Print a report, and write its figures as JSON if there is a file to write them to."""
    print(text)
    if target is not None:
        write(target, figures + "\n")


def write(target: Path, text: str) -> None:
    """Replace the content of a file; a link to one stays a link.

    Raises:
        OSError: If it cannot be written; it names the file, which is as it was.
    """
    from fambav.engine.checkpoint import write_text

    write_text(target.resolve() if target.is_symlink() and target.is_file() else target, text)
