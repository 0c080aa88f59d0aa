"""Numbers and pictures for TensorBoard, which a run does without if they cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class Events:
    """A TensorBoard writer.

    Args:
        folder: Gets the file of events.
        epoch: Where to go on; what an interrupted run wrote from there on is left out.
        warn: Told in one line if the package is missing or the file cannot be written; nothing
            more is written then.
    """

    def __init__(self, folder: Path, *, epoch: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warn("no TensorBoard events are written: pip install tensorboard")
            return
        self._writer = SummaryWriter(folder, purge_step=epoch or None)

    def add(self, kind: str, *given: Any) -> None:
        """Add a "scalar" or an "image": its name, what it is, and the number of its step."""
        self._try(f"add_{kind}", *given)

    def flush(self) -> None:
        """Write what has been added."""
        self._try("flush")

    def close(self) -> None:
        """Finish the file."""
        self._try("close")

    def _try(self, call: str, *given: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, call)(*given)
        except OSError as error:  # of the thread that writes, at the next call
            writer, self._writer = self._writer, None
            self._warn(f"warning: no more TensorBoard events are written ({error.strerror})")
            with suppress(OSError):
                writer.close()
