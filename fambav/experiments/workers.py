"""Processes that carry out cells, each one at a time, started once: importing torch takes seconds.

None of them outlives its parent: not if the grid ends, is interrupted or is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType

from fambav.experiments.results import Record, Task, lost, perform

_CONTEXT = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork


class Worker:
    """A process and the pipe to it.

    Attributes:
        pipe: Takes a task, gives its record.
        task: What it works on.
    """

    def __init__(self) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.task: Task | None = None
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()  # so that its end closes with the process

    def begin(self, task: Task) -> None:
        """Hand it a task."""
        self.task = task
        with suppress(ConnectionError):  # `receive` tells that the process is gone
            self.pipe.send(task)

    def receive(self, task: Task) -> tuple[Record, bool]:
        """Wait for the record of a task; tell too whether the process is still there."""
        try:
            found: Record = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return lost(task, self._process.exitcode), False
        return found, True

    def end(self) -> None:
        """End the process, whatever it works on."""
        self._process.terminate()
        self._process.join()
        self.pipe.close()


class Workers:
    """Processes that live as long as a `with` block.

    Args:
        jobs: How many; one is the calling process itself.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._workers: list[Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.end()

    def perform(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Record]]:
        """Carry out tasks.

        Args:
            tasks: Tasks that do not depend on each other.

        Yields:
            Each task with its record, as soon as it is finished.
        """
        if self._jobs == 1:
            yield from ((task, perform(task)) for task in tasks)
            return
        waiting = deque(tasks)
        while waiting or self._busy():
            self._hand_out(waiting)
            busy = self._busy()
            ready = set(wait(list(busy)))
            for pipe in (pipe for pipe in busy if pipe in ready):
                worker, task = busy[pipe]
                record, alive = worker.receive(task)
                worker.task = None
                if not alive:
                    self._workers.remove(worker)
                    worker.end()
                yield task, record

    def _busy(self) -> dict[Connection, tuple[Worker, Task]]:
        return {w.pipe: (w, w.task) for w in self._workers if w.task is not None}

    def _hand_out(self, waiting: deque[Task]) -> None:
        """Give every worker without a task one, and start those that are missing."""
        idle = [worker for worker in self._workers if worker.task is None]
        while waiting and (idle or len(self._workers) < self._jobs):
            if not idle:
                idle.append(Worker())
                self._workers.append(idle[0])
            idle.pop().begin(waiting.popleft())


def _serve(pipe: Connection) -> None:
    """Carry out what comes until the parent is gone.  Only the parent heeds an interruption."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionError):
            return
        record = perform(task)
        with suppress(ConnectionError):
            pipe.send(record)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a thread cannot end its process otherwise; files are written atomically
