"""One run for one folder."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder inside the block.

    The kernel holds the lock for this process and releases it when the process dies, however it
    does, so there are no stale locks.  Forked processes do not share it.

    Args:
        folder: Made if it is missing.

    Raises:
        ValueError: If another run has it; the message names its machine and its process.
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"output_dir is {str(folder)!r}, expected a folder that no other run writes to; "
                f"{holder} does"
            ) from None
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S%z")
        file.write(f"process {os.getpid()} on {platform.node()}, since {since}\n")
        file.flush()
        yield
