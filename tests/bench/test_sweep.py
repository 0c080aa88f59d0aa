"""Block sizes are tried where the kernels offer a choice."""

import pytest
import torch

from fambav.bench import sweep
from fambav.ops.kernels import TRITON


def chosen(u, *, block=None, warps=None):
    """A kernel that offers a choice."""


def fixed(u):
    """A kernel that offers none."""


def test_every_form_is_tried_beside_the_shipped_one():
    assert sweep._forms(fixed, (16,), (1,)) == {"as shipped": {}}
    assert sweep._forms(chosen, (16, 32), (1,)) == {
        "as shipped": {},
        "block 16 warps 1": {"block": 16, "warps": 1},
        "block 32 warps 1": {"block": 32, "warps": 1},
    }


def test_the_best_form_stands_beside_the_shipped_one():
    times = {"as shipped": [4.0, 4.0], "a": [2.0, 2.0], "b": [3.0, 3.0]}
    best = sweep._best(times)
    assert (best["best"], best["best_ms"], best["shipped_ms"]) == ("a", 2.0, 4.0)
    assert (best["times_faster"], best["all_ms"]) == (2.0, {"as shipped": 4.0, "a": 2.0, "b": 3.0})


def test_a_form_that_cannot_run_is_left_out_with_its_reason(monkeypatch):
    class Calls:
        def scan_forward(self, block=64, warps=1):
            if block < 32:
                raise ValueError("block is 16, expected 32 or more")

    kernels = type("Set", (), {"load": lambda _: type("", (), {"scan_forward": chosen})})()
    monkeypatch.setattr(sweep, "kernel_set", lambda _: kernels)
    found, refused = sweep._ready(Calls(), "scan_forward", (16, 32), (1,), torch.device("cpu"))
    assert list(found) == ["as shipped", "block 32 warps 1"]
    assert refused == {"block 16 warps 1": "block is 16, expected 32 or more"}


@pytest.mark.skipif(TRITON.missing() is not None, reason="needs triton")
def test_a_sweep_has_a_row_for_every_kernel_dtype_and_length():
    report = sweep.sweep(
        batch=1,
        lengths=(3,),
        dim=32,
        state=4,
        blocks=(32,),
        warps=(1,),
        dtypes=(torch.float32,),
        rounds=1,
        warmup=0,
        device=torch.device("cpu"),
    )
    assert [row["kernel"] for row in report.rows] == ["scan_forward", "scan_backward"]
    assert all(row["shipped_ms"] >= row["best_ms"] > 0 for row in report.rows)
