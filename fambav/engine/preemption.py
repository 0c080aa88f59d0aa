"""The end of a run between two updates: by a signal, or by batches that cannot be read.

All processes end at the same update, after the state has been saved.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from fambav.engine.distributed import Processes
from fambav.engine.step import Batch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_REQUEST = 3.0  # seconds in which further signals are copies of the first
_FAILED = 1000  # beyond every signal
_UNREADABLE = (RuntimeError, ValueError, OSError)


class Preempted(SystemExit):
    """A signal ended the run after its state was saved; the exit status is that of the process.

    Attributes:
        signal: Which of SIGNALS.
    """

    def __init__(self, number: int) -> None:
        self.signal = SIGNALS[SIGNALS.index(number)]
        super().__init__(0 if self.signal == signal.SIGUSR1 else 128 + number)


class LoaderError(RuntimeError):
    """Samples could not be read, in one sentence."""


class Preemption:
    """Notes the first signal, inside a `with` block; a later one ends the process at once.

    SIGTERM means that the process has to end, SIGUSR1 that the run will be continued elsewhere.
    One request may come as several signals: `timeout` sends to its child and then to the group, a
    scheduler to all processes, of which a launcher passes it on.  A second request is one that
    comes `ONE_REQUEST` seconds after the first or later.

    Outside the main thread no handler can be installed, and signals do what they did before.

    Attributes:
        signal: Number of the first signal; 0 before one.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since >= ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Prefetcher:
    """Reads the batches of an update before it, so that processes agree on whether they can.

    Args:
        batches: This process's micro-batches in order.
        count: Micro-batches of an update.
        processes: Those that share the update.
        preemption: Whether a signal has come.
    """

    def __init__(
        self, batches: Iterator[Batch], *, count: int, processes: Processes, preemption: Preemption
    ) -> None:
        self._batches, self._count = batches, count
        self._processes, self._preemption = processes, preemption
        self._ready: deque[Batch] = deque()
        self._failure: Exception | None = None

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        return self._ready.popleft()

    def prefetch(self) -> None:
        """Read the batches of the next update.

        Raises:
            Preempted: If a process has got a signal.
            LoaderError: If a process cannot read its batches.
        """
        try:
            while len(self._ready) < self._count:
                self._ready.append(next(self._batches))
        except _UNREADABLE as error:
            self._failure = error
        self._agree()

    def take(self, stream: Iterator[Batch]) -> Batch | None:
        """Read one batch of another stream; None at its end.

        Raises:
            Preempted: If a process has got a signal.
            LoaderError: If a process cannot read.
        """
        batch = None
        try:
            batch = next(stream, None)
        except _UNREADABLE as error:
            self._failure = error
        self._agree()
        return batch

    def _agree(self) -> None:
        """End all processes if one cannot go on."""
        code = self._processes.largest(_FAILED if self._failure else self._preemption.signal)
        if code == _FAILED:
            self._fail()
        if code:
            raise Preempted(code)

    def _fail(self) -> NoReturn:
        """Raise the error of whichever process had it."""
        reasons = self._processes.gather(None if self._failure is None else str(self._failure))
        text = next(reason for reason in reasons if reason is not None)
        raise LoaderError(text) from self._failure
