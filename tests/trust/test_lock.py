"""Two jobs, one folder: one runs."""

import os
import signal

import pytest

from fambav.engine.lock import locked
from tests.trust import forked
from tests.trust.forked import run

STARTS = 5


@pytest.mark.parametrize("number", range(STARTS))
def test_of_two_jobs_that_start_together_exactly_one_runs(recipe, tmp_path, number):
    words = [*recipe, "--output_dir", tmp_path / "run", "--epochs", "1", "--resume", "auto"]
    outputs = [tmp_path / f"{name}.txt" for name in "ab"]
    jobs = [forked.start(words, output) for output in outputs]
    for job in jobs:
        job.join(120)
    texts = [output.read_text() for output in outputs]
    refused = [text for text in texts if "no other run writes to" in text]
    if sorted(job.exitcode for job in jobs) == [0, 0]:  # one had ended before the other came
        assert any("going on from" in text for text in texts)
        return
    assert sorted(job.exitcode for job in jobs) == [0, 2]
    (line,) = [line for line in refused[0].splitlines() if line.startswith("error: ")]
    holder = jobs[texts.index(next(text for text in texts if text not in refused))]
    assert f"process {holder.pid} on {os.uname().nodename}" in line


def test_a_killed_job_leaves_no_lock(recipe, tmp_path):
    folder = tmp_path / "run"
    first = run(recipe, folder, forked.dies_in_update)
    assert first.status == -signal.SIGKILL
    assert (folder / ".lock").exists()
    assert run([*recipe, "--resume", "auto", "--epochs", "3"], folder).status == 0


def test_a_lock_that_is_held_names_its_holder(tmp_path):
    reader, writer = os.pipe()
    with locked(tmp_path / "new"):
        child = os.fork()
        if child == 0:
            try:
                with locked(tmp_path / "new"):
                    os.write(writer, b"got it")
            except ValueError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
    text = os.read(reader, 1000).decode()
    assert text.startswith(f"output_dir is '{tmp_path / 'new'}', expected a folder that no other")
    assert f"process {os.getpid()} on" in text
    with locked(tmp_path / "new"):
        pass
