"""Processes that train together meet, and leave one another."""

import os
import time

import torch
import torch.distributed as dist

from fambav.engine.distributed import processes
from tests.trust.forked import FORK


def _joins(rank, attempt, port):
    """Join as a process of a launcher that keeps the store."""
    place = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, GROUP_WORLD_SIZE=1)
    place |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RESTART_COUNT=attempt)
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return processes("cpu")


def _pair(target, *given):
    """Run a function in two processes; return their exit statuses."""
    pair = [FORK.Process(target=target, args=(rank, *given)) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in pair]


def _meets(rank, attempt, port, answers):
    time.sleep(0 if rank else 2 * attempt)
    with _joins(rank, attempt, port) as group:
        answers.put(group.total(torch.ones(1)).item())
        group.wait()


def test_processes_started_again_do_not_look_for_those_before_them():
    """The launcher's store lasts.  Of the second pair one comes late, and the other waits."""
    store, answers = dist.TCPStore("127.0.0.1", 0, is_master=True), FORK.SimpleQueue()
    for attempt in range(2):
        assert _pair(_meets, attempt, store.port, answers) == [0, 0]
        assert [answers.get() for _ in range(2)] == [2.0, 2.0]


def _leaves(rank, port):
    torch.set_num_threads(1)
    for attempt in range(8):
        with _joins(rank, attempt, port) as group:
            model = group.wrap(torch.nn.Linear(1, 1))
            group.largest(1)
        del model
    os._exit(0)


def test_a_model_that_outlives_its_group_does_not_wait_for_its_threads():
    """As it does when a run fails, and its frames are let go of last."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    assert _pair(_leaves, store.port) == [0, 0]
