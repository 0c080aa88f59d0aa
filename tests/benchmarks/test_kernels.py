"""Kernels are timed on their own, in every form that they offer."""

import json

import pytest
import torch
from kernels import KERNELS, best_form, main, ready_forms

from fambav.cli import guarded
from fambav.ops.kernels import TRITON

needs_triton = pytest.mark.skipif(TRITON.unavailable() is not None, reason="needs triton")


def test_the_best_form_stands_beside_the_shipped_one():
    times = {"as shipped": [4.0, 4.0], "a": [2.0, 2.0], "b": [3.0, 3.0]}
    best = best_form(times)
    assert (best["best"], best["best_ms"], best["shipped_ms"]) == ("a", 2.0, 4.0)
    assert (best["times_faster"], best["all_ms"]) == (2.0, {"as shipped": 4.0, "a": 2.0, "b": 3.0})


@needs_triton
def test_every_form_of_a_scan_is_tried_and_one_that_cannot_run_has_its_reason():
    def scan(block=64, warps=1):
        if block < 32:
            raise ValueError("block is 16, expected 32 or more")

    found, refused = ready_forms(scan, "scan_forward", (16, 32), (1, 2), torch.device("cpu"))
    assert list(found) == ["as shipped", "block 32 warps 1", "block 32 warps 2"]
    assert refused["block 16 warps 1"] == "block is 16, expected 32 or more"
    assert list(ready_forms(scan, "gate_forward", (32,), (1,), torch.device("cpu"))[0]) == [
        "as shipped"
    ]


@needs_triton
def test_the_command_has_a_row_for_every_kernel_dtype_and_length(tmp_path, capsys):
    target = tmp_path / "kernels.json"
    words = "--batch 1 --length 3 --dim 32 --state 4 --blocks 32 --warps 1 --dtype float32"
    more = ["--rounds", "1", "--warmup", "0", "--device", "cpu", "--json", str(target)]
    assert guarded(main, [*words.split(), *more]) == 0
    assert "shipped ms" in capsys.readouterr().out
    rows = json.loads(target.read_text())["rows"]
    assert [(row["kernel"], row["length"]) for row in rows] == [(name, 3) for name in KERNELS]
    assert all(row["shipped_ms"] >= row["best_ms"] > 0 for row in rows)
    assert len(rows[0]["all_ms"]) == 2
    assert guarded(main, ["--batch", "0", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: batch is 0, expected at least 1\n"
