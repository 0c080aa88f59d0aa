"""What commands print and write."""

from __future__ import annotations

from pathlib import Path


def show(text: str, figures: str, target: Path | None) -> None:
    """Print a report, and write its figures as JSON if there is a file to write them to."""
    print(text)
    if target is not None:
        target.write_text(figures + "\n", encoding="utf-8")
