"""Loader processes outlast a signal that is sent to all processes of a job at once.

Schedulers and `timeout` do so.  The main process takes note and ends when the state is saved; until
then it needs batches.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def outlast(_: int) -> None:
    """Let only the main process end this one, a loader process, by SIGTERM; on Linux."""
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=_heed, args=(os.getppid(),), daemon=True).start()


def _heed(main: int) -> None:
    while True:
        found = signal.sigwaitinfo(_SIGNALS)
        if found.si_signo == signal.SIGTERM and found.si_pid == main:
            os._exit(0)  # as torch's own handler does: another status would be an error to it
