"""How numba kernels are compiled, kept and started."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")
import numba

from fambav.ops import numba as numba_kernels
from fambav.ops.numba import compilation


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(params=["team", "python"])
def runtime(request, monkeypatch):
    if request.param == "python":  # as in a fork, and where torch has no OpenMP
        monkeypatch.setattr(compilation, "openmp", lambda: None)
    return request.param


def gated(seed=0):
    """Run a small kernel; return what it wrote and what PyTorch says."""
    y, z = torch.randn(2, 3, 65, 40, generator=torch.Generator().manual_seed(seed)).unbind()
    out = torch.empty_like(z)
    numba_kernels.gate_forward(y[None], z, out, None, scale=1.0)
    return out, torch.nn.functional.silu(z) * y


@pytest.mark.parametrize("tasks", [1, 2, 1000])
def test_every_task_is_done_once_by_no_more_threads_than_pytorch_uses(threads, tasks):
    lock, done, workers = threading.Lock(), [], set()

    def function(counter, array):
        workers.add(threading.current_thread().name)
        while True:
            with lock:
                task, counter[0] = counter[0], counter[0] + 1
            if task >= tasks:
                return
            array[task] += 1
            done.append(task)

    written = torch.zeros(tasks)
    compilation.launch(function, tasks, (), (written,))
    assert sorted(done) == list(range(tasks))
    assert (written == 1).all()
    assert len(workers) <= min(threads, tasks)


def test_other_threads_do_take_part():
    torch.set_num_threads(2)
    meeting = threading.Barrier(2, timeout=60)
    try:
        compilation.launch(lambda counter: meeting.wait(), 2, (), ())
    finally:
        torch.set_num_threads(1)
    assert not meeting.broken


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_an_error_in_any_thread_is_raised(threads):
    meeting = threading.Barrier(threads, timeout=60)

    def function(counter):
        if meeting.wait() == 1:
            raise MemoryError("no buffer")

    with pytest.raises(MemoryError, match="no buffer"):
        compilation.launch(function, 2, (), ())


@compilation.kernel(compilation.COUNTER, compilation.floats(4), numba.boolean, numba.float32)
def _count(counter, out, fails, factor):
    while True:
        task = compilation.next_task(counter)
        if task >= out.size:
            break
        if fails:
            raise MemoryError
        out[task, 0, 0, 0] += factor * (task + 1)


@pytest.mark.parametrize("tasks", [2, 1000])
@pytest.mark.usefixtures("threads", "runtime")
def test_a_kernel_does_every_task_once_whoever_runs_it(tasks):
    out = torch.zeros(tasks, 1, 1, 2)[..., :1]
    compilation.launch(_count, tasks, (), (out,), False, 0.5)
    assert out.flatten().tolist() == [0.5 * (n + 1) for n in range(tasks)]


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.usefixtures("threads", "runtime")
def test_a_kernel_that_fails_in_a_thread_raises():
    with pytest.raises(MemoryError):
        compilation.launch(_count, 2, (), (torch.zeros(2, 1, 1, 1),), True, 1.0)


@pytest.mark.usefixtures("threads", "runtime")
def test_kernels_may_be_started_from_several_threads_at_once():
    found = {}

    def work(seed):
        found[seed] = [gated(seed) for _ in range(20)]

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(found) == [0, 1, 2, 3]
    for results in found.values():
        for got, want in results:
            torch.testing.assert_close(got, want)


CODE = """
import os, threading
import numba, torch
before = {n: getattr(numba.config, n) for n in dir(numba.config) if n.isupper()}
import fambav.ops.numba as kernels
assert before == {n: getattr(numba.config, n) for n in before}
assert torch.get_num_threads() == 2
assert sum(kernels.gate._gate_backward_kernel.stats.cache_hits.values()) == 1

def works():
    meeting = threading.Barrier(2, timeout=60)
    kernels.compilation.launch(lambda counter: meeting.wait(), 2, (), ())
    y, out = torch.ones(1, 2, 65, 40), torch.zeros(2, 65, 40)
    kernels.gate_forward(y, y[0], out, None, scale=1.0)
    return 0.73 < out.min().item() < 0.74

assert works()
child = os.fork()
if not child:
    os._exit(0 if works() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_another_process_loads_what_is_kept_in_silence_and_may_fork(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_kept_code_is_told_apart_by_all_sources(tmp_path):
    found = set()
    for name, text in (("a", "1"), ("b", "2"), ("a", "3")):
        (tmp_path / f"{name}.py").write_text(text)
        found.add(compilation.digest(*sorted(tmp_path.glob("*.py"))))
    assert len(found) == 3
    name = numba_kernels.gate._gate_forward_kernel.py_func.__qualname__
    folder = Path(compilation.__file__).parent
    constants = folder.with_name("kept_states.py")
    assert name.endswith(compilation.digest(*sorted(folder.glob("*.py")), constants))


def test_a_kernel_that_cannot_be_kept_is_compiled_and_that_is_said(monkeypatch):
    def without_folder(*types, cache=False, **options):
        if cache:
            raise RuntimeError("no locator available")
        return made(*types, **options)

    made = numba.njit
    monkeypatch.setattr(numba, "njit", without_folder)
    with pytest.warns(UserWarning, match="every process compiles it anew: no locator available"):

        @compilation.kernel(numba.float32[::1])
        def double(x):
            x[0] *= 2

    x = torch.ones(1).numpy()
    double(x)
    assert x[0] == 2
