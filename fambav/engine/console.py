"""The lines that a run prints."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from fambav.text import printable


class Console:
    """Lines for whoever watches: a bar on a terminal, plain lines elsewhere, nothing if silent."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._bar: Any = None

    def write(self, text: str) -> None:
        """Write one line, or several."""
        if not self._silent:
            self._close()
            sys.stdout.write("".join(f"{printable(line)}\n" for line in text.split("\n")))
            sys.stdout.flush()

    def step(self, label: str, done: int, total: int, text: str) -> None:
        """Show that `done` of `total` steps of `label` are done, with `text` behind."""
        if self._silent:
            return
        if not sys.stdout.isatty():
            self.write(f"{label} [{done}/{total}] {text}")
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc=label, file=sys.stdout, leave=False)
        self._bar.n = done
        self._bar.set_postfix_str(text)
        if done >= total:  # the bar goes, the last line stays
            self.write(f"{label} [{done}/{total}] {text}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
