"""Which backend runs, and that a forced one never gives way."""

import os
import subprocess
import sys

import pytest
import torch

from fambav.ops import BackendError, backends, causal_conv1d, dispatch, force, selective_scan
from fambav.ops import set_backend as set_process_backend
from fambav.ops.dispatch import Backend, Table
from fambav.registry import SCAN_BACKENDS
from tests.ops.agreement import scan_inputs


@pytest.fixture
def table(monkeypatch):
    """One backend for small tensors, one that is not installed, one for everything."""
    monkeypatch.setattr(dispatch, "_tables", {})
    monkeypatch.setattr(dispatch, "_forced", {})

    def too_large(x):
        return "x is too large" if x.numel() > 3 else None

    return Table(
        "op",
        Backend("small", lambda: "small", too_large),
        Backend("absent", lambda: "absent", unavailable=lambda: "it is not installed"),
        Backend("any", lambda: "any"),
    )


def test_the_first_backend_that_takes_the_tensors_runs(table):
    assert table.pick(torch.ones(3))() == "small"
    assert table.pick(torch.ones(4))() == "any"


def test_a_forced_backend_runs_even_if_it_is_the_last(table):
    with force("any", "op"):
        assert table.pick(torch.ones(1))() == "any"
    assert table.pick(torch.ones(1))() == "small"


def test_a_forced_backend_never_gives_way(table):
    with (
        force("small", "op"),
        pytest.raises(BackendError, match="backend 'small' of op cannot run: x is too large"),
    ):
        table.pick(torch.ones(4))
    with (
        force("absent", "op"),
        pytest.raises(BackendError, match="backend 'absent' of op cannot run: it is not installed"),
    ):
        table.pick(torch.ones(1))


def test_force_ends_with_its_block_whatever_happens(table):
    with pytest.raises(ZeroDivisionError), force("any", "op"):
        raise ZeroDivisionError
    with force("any", "op"), force(None, "op"):
        assert table.pick(torch.ones(1))() == "small"
    assert table.pick(torch.ones(1))() == "small"


def test_set_backend_lasts_and_refuses_at_once_what_cannot_run(table):
    set_process_backend("any", "op")
    assert table.pick(torch.ones(1))() == "any"
    with pytest.raises(BackendError, match="'absent' of op cannot run: it is not installed"):
        set_process_backend("absent", "op")
    assert table.pick(torch.ones(1))() == "any"
    set_process_backend(None, "op")
    assert table.pick(torch.ones(1))() == "small"


@pytest.mark.parametrize("choose", [set_process_backend, lambda *names: force(*names).__enter__()])
def test_unknown_names_are_refused_with_the_known_ones(table, choose):
    with pytest.raises(BackendError, match="backend of op is 'fast', expected one of small, abs"):
        choose("fast", table.op)
    with pytest.raises(BackendError, match="operation is 'pool', expected one of op"):
        choose("any", "pool")


def test_every_backend_is_listed_with_why_it_cannot_run(table):
    want = [("op", "small", None), ("op", "absent", "it is not installed"), ("op", "any", None)]
    assert table.backends
    assert backends() == want


def test_the_scan_has_the_backends_that_a_flag_may_name():
    listed = [name for op, name, _ in backends() if op == "selective_scan"]
    assert listed == list(SCAN_BACKENDS)
    assert {op for op, _, _ in backends()} == {
        *("selective_scan", "ordered_scan", "aligned_scan", "bimamba_scan"),
        *("causal_conv1d", "add_rms_norm", "match", "pool"),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_cuda_on_a_machine_without_it_says_so():
    for op, name, reason in backends():
        if name == "cuda":
            assert "torch sees no CUDA device" in reason, op
    with force("cuda"), pytest.raises(BackendError, match="a tensor is on cpu, expected a CUDA"):
        selective_scan(**scan_inputs(1, 2, 1, 2, 3))
    with force("cuda", "causal_conv1d"), pytest.raises(BackendError, match="a tensor is on cpu"):
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(2, 4))


def test_a_name_from_the_environment_is_checked_at_the_first_call(table, monkeypatch):
    monkeypatch.setitem(dispatch._forced, "op", "fast")
    with pytest.raises(BackendError, match="backend of op is 'fast', expected one of small"):
        table.pick(torch.ones(1))


def test_the_environment_forces_the_scan():
    code = (
        "import torch; from fambav.ops.selective_scan import SELECTIVE_SCAN as table\n"
        "x = torch.ones(1, 2, 3, 4)\n"
        "print(table.pick(x, x, x, x) is table['reference'].run)"
    )
    env = os.environ | {"FAMBAV_BACKEND": "reference"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
