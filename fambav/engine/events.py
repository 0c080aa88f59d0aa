"""Numbers and pictures for TensorBoard; a run goes on if they cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class Events:
    """A TensorBoard writer.

    Args:
        folder: Gets the file of events.
        old: Files of an interrupted run that goes on, in order.  What they hold of the updates that
            are done is written again, and they are removed.
        updates: How many updates those are.
        epochs: Values of the epochs that are done, by name and epoch.
        warn: Called with a line if the package is missing or the file cannot be written; nothing
            more is written then.
    """

    def __init__(
        self,
        folder: Path,
        *,
        old: Sequence[Path],
        updates: int,
        epochs: Mapping[tuple[str, int], float],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warn("no TensorBoard events are written: pip install tensorboard")
            return
        try:
            written = _scalars(old)
            self._writer = SummaryWriter(folder)
        except UnicodeEncodeError:
            warn("warning: no TensorBoard events are written: the folder's name is no UTF-8")
            return
        for (name, step), (value, seconds) in written.items():
            if name.startswith("update/") and step < updates:
                self.add("scalar", name, value, step, seconds)
        for key, value in epochs.items():
            self.add("scalar", key[0], value, key[1], written.get(key, (value, None))[1])
        self.flush()
        if self._writer is not None:
            for path in old:
                path.unlink()

    def add(self, kind: str, *given: Any) -> None:
        """Add a "scalar" or an "image": its name, its value, the number of its step, its time."""
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


def _scalars(files: Sequence[Path]) -> dict[tuple[str, int], tuple[float, float]]:
    """The values in files of events with the seconds when they were written, by name and step."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return {
        (value.tag, event.step): (value.simple_value, event.wall_time)
        for path in files
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.HasField("simple_value")
    }
