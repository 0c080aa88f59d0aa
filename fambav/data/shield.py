"""Loader processes outlast a signal that is sent to all processes of a job at once.

Schedulers, `timeout` and Ctrl-C do so.  The main process takes note and ends when the state is
saved; until then it needs batches.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_LOOK = 1.0  # seconds between looks at the main process; torch's own miss one that died early


@contextmanager
def shielded() -> Iterator[None]:
    """Start loader processes inside the block: from birth no thread of theirs takes a signal.

    A process takes the mask of the thread that starts it.  One that came to block signals itself
    would be too late for those sent before, and for the threads that torch has started in it by
    then.  This process's own handlers are called at the end of the block: one that raises would
    leave torch's loader half made.  On Linux.
    """
    if sys.platform != "linux":
        yield
        return
    came: set[int] = set()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # another thread may still take one
    handlers = _handlers()
    for number in handlers:
        signal.signal(number, lambda found, _: came.add(found))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in came:
            signal.raise_signal(number)


def _handlers() -> dict[int, Any]:
    """Return this process's handlers in Python, which only the main thread can change."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    return {number: handler for number, handler in found.items() if callable(handler)}


def outlast(_: int) -> None:
    """Let nothing but the main process end this one, which was started shielded; on Linux.

    It does so by SIGTERM, or by its own end.
    """
    main = multiprocessing.parent_process()
    if sys.platform == "linux" and main is not None:
        threading.Thread(target=_heed, args=(main,), daemon=True).start()


def _heed(main: Any) -> None:
    while main.is_alive():
        found = signal.sigtimedwait(_SIGNALS, _LOOK)
        if found and found.si_signo == signal.SIGTERM and found.si_pid == main.pid:
            break
    os._exit(0)  # as torch's own handler does: another status would be an error to it
