"""A process that is lost is started again by the launcher, and the run completes."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from fambav.engine.runtime import processes
from tests.trust import soak
from tests.trust.forked import FORK


@pytest.mark.slow
def test_a_run_that_lost_a_process_is_completed_by_its_launcher_to_the_same_bits(recipe, tmp_path):
    found = soak.elastic([*recipe, "--batch-size", "4"], tmp_path)
    assert found == {"ranks killed": 1, "identical": 1}


def _meets(rank, attempt, port, late, answers):
    time.sleep(late)
    place = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, GROUP_WORLD_SIZE=1)
    place |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RESTART_COUNT=attempt)
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with processes("cpu") as group:
        answers.put((attempt, group.total(torch.ones(1)).item()))
        group.wait()


def test_processes_started_again_do_not_look_for_those_before_them():
    """The launcher's store lasts.  Of the second pair one comes late, and the other waits."""
    store, answers = dist.TCPStore("127.0.0.1", 0, is_master=True), FORK.SimpleQueue()
    for attempt, late in enumerate((0, 2)):
        pair = [
            FORK.Process(target=_meets, args=(rank, attempt, store.port, wait, answers))
            for rank, wait in enumerate((late, 0))
        ]
        for process in pair:
            process.start()
        for process in pair:
            process.join(30)
            process.kill()
            process.join()
        assert [process.exitcode for process in pair] == [0, 0]
        assert [answers.get() for _ in pair] == [(attempt, 2.0)] * 2
