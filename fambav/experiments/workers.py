"""Processes that carry out cells, each one at a time, started once: importing torch takes seconds.

Where there are several GPUs, each process sees one of them.  No process outlives its parent: not if
the grid ends, is interrupted or is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType

import torch

from fambav.experiments.results import Record, Task, lost, perform

VISIBLE = "CUDA_VISIBLE_DEVICES"

_CONTEXT = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork

Variables = Mapping[str, str]


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get(VISIBLE)
    if not count or named is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in named.split(",")][:count]


def variables(jobs: int, devices: Sequence[str]) -> list[Variables]:
    """Return the environment variables of each process: its own GPU, if there are several.

    Args:
        jobs: How many processes.
        devices: What `gpus` returns; more processes than GPUs share them in turn.
    """
    if len(devices) < 2:
        return [{} for _ in range(jobs)]
    return [{VISIBLE: devices[number % len(devices)]} for number in range(jobs)]


class Worker:
    """A process and the pipe to it.

    Args:
        variables: What it finds in its environment besides what is in ours, before it imports
            anything.

    Attributes:
        pipe: Takes a task, gives its record.
        task: What it works on.
        variables: As above.
    """

    def __init__(self, variables: Variables) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.task: Task | None = None
        self.variables = variables
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,))
        with _environment(variables):  # a spawned process starts with a copy
            self._process.start()
        theirs.close()  # so that its end closes with the process

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

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
        self._unused = deque(variables(jobs, gpus() if jobs > 1 else []))

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
                    self._unused.append(worker.variables)
                    worker.end()
                yield task, record

    def _busy(self) -> dict[Connection, tuple[Worker, Task]]:
        return {w.pipe: (w, w.task) for w in self._workers if w.task is not None}

    def _hand_out(self, waiting: deque[Task]) -> None:
        """Give every worker without a task one, and start those that are missing."""
        idle = [worker for worker in self._workers if worker.task is None]
        while waiting and (idle or len(self._workers) < self._jobs):
            if not idle:
                idle.append(Worker(self._unused.popleft()))
                self._workers.append(idle[0])
            idle.pop().begin(waiting.popleft())


@contextmanager
def _environment(more: Variables) -> Iterator[None]:
    """Add variables to the environment of the process as long as the block runs."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
