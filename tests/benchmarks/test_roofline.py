"""Floors are counted; what a machine can do is told or measured."""

import json
from types import SimpleNamespace

import pytest
import roofline as module
import torch
from aot import Audit, Row
from roofline import (
    ADAMW,
    MACHINES,
    STEP,
    Machine,
    Shape,
    Work,
    described,
    issue_slots,
    kernel_times,
    kernel_work,
    merging_work,
    product_work,
    roofline,
    step_us,
)

from fambav.bench.report import MeasureError
from fambav.bench.roofline import mixer_bytes
from fambav.models import Vim
from fambav.ops.kernels import TRITON
from tests.bench import find

CPU = torch.device("cpu")
SLOW = Machine("slow", 90, bytes=1e6, flops=1e9, multiprocessors=2, clock_hz=1e6)
SHAPE = Shape(batch=3, length=70, dim=8, inner=16, state=4, rank=2, itemsize=2)


def test_the_floor_is_the_largest_limit():
    work = Work(bytes=5, exps=64, steps=3200, flops=2000)
    limits = SLOW.limits_us(work, slots=12.0)
    # 16 lanes and 4 schedulers of 2 multiprocessors at 1 MHz
    assert limits == {"bytes_us": 5.0, "exp_us": 2.0, "issue_us": 150.0, "product_us": 2.0}
    assert SLOW.bound_us(work, slots=12.0) == 150
    assert SLOW.limits_us(work)["issue_us"] is None
    assert SLOW.bound_us(work) == 5


def test_products_of_float32_are_counted_at_half_the_rate():
    wide, narrow = (described("h200", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert narrow == MACHINES["h200"]
    assert 2 * wide.flops == narrow.flops


def test_a_scan_reads_and_writes_each_tensor_once():
    tokens, inner = 3 * 70, 16
    one = tokens * inner * 2
    BC = 2 * tokens * 2 * 4 * 2
    kept = 2 * 3 * 4 * inner * 4 * 2  # a bfloat16 state every 16 tokens of 70 but at the end
    found = kernel_work(SHAPE)
    assert found["scan_forward"].bytes == 6 * one + BC + kept
    assert found["scan_backward"].bytes == 9 * one + 2 * BC + kept
    assert found["scan_forward"].steps == found["scan_backward"].steps == 2 * tokens * inner * 4
    assert found["norm_forward"].bytes == tokens * (2 * 8 * (2 + 4) + 4)


def test_a_product_is_made_with_both_gradients():
    assert product_work(SHAPE)["in_proj"].flops == 3 * 2 * (3 * 70) * (8 * 32)
    assert product_work(SHAPE)["dt_proj"].flops == 4 * 2 * (3 * 70) * (2 * 2 * 16)


@pytest.mark.parametrize("keep", [True, False])
def test_the_bytes_inside_the_fused_mixer_are_those_of_its_kernels_and_products(keep):
    made, found = product_work(SHAPE), kernel_work(SHAPE)
    often = {"x_proj": 3, "dt_proj": 4, "out_proj": 3}  # how often each product is made
    once = sum(made[name].bytes / times for name, times in often.items())
    ways = ("forward", "backward")
    ahead, back = (sum(found[f"{n}_{w}"].bytes for n in ("scan", "conv", "gate")) for w in ways)
    back += found["conv_forward"].bytes + sum(made[name].bytes for name in often) - once
    kept = 3 * 70 * 16 * 2 + 2 * 3 * 4 * 16 * 4 * 2  # the sum; a bfloat16 state every 16 tokens
    want = dict(forward=ahead + once - (0 if keep else kept), backward=back)
    assert mixer_bytes(**SHAPE._asdict(), keep=keep) == pytest.approx(want)


def test_the_counts_of_a_vim_tiny_block_are_those_of_its_sizes():
    with torch.device("meta"):
        net = Vim(dim=192, depth=24)
    shape = Shape.of(net, batch=128, itemsize=2)
    assert shape == (128, 197, 192, 384, 16, 12, 2)
    assert kernel_work(shape)["scan_forward"].steps == pytest.approx(310e6, rel=1e-2)
    assert kernel_work(shape)["scan_forward"].exps == pytest.approx(350e6, rel=1e-2)


def test_the_floor_of_a_step_sums_its_blocks_at_their_lengths():
    with torch.device("meta"):
        net = Vim(dim=8, depth=2, img_size=32, patch_size=4, fusion_strategy="all", fusion_token=9)
    shape = Shape.of(net, batch=2, itemsize=2)
    expected = 1e6 * ADAMW * sum(p.numel() for p in net.parameters()) / SLOW.bytes
    for before, after in ((65, 56), (56, 47)):
        expected += SLOW.bound_us(merging_work(shape._replace(length=before), 9))
        at, left = (shape._replace(length=length) for length in (before, after))
        for name, work in (kernel_work(left) | product_work(left)).items():
            times = 2 if name in ("conv_forward", "gate_forward") else 1
            work = kernel_work(at)[name] if name.startswith("norm") else work
            expected += times * SLOW.bound_us(work, 30.0 if name == "scan_backward" else None)
    assert step_us(net, shape, SLOW, {"scan_backward": 30.0}) == pytest.approx(expected)


def test_on_a_cpu_floors_are_counted_and_said_to_be():
    report = roofline(model="vim_tiny", device=CPU)
    assert report.title == "roofline bounds, without times"
    assert report.settings["machine"] == MACHINES["h200"].name
    assert all(row["time_us"] is row["time_over_bound"] is None for row in report.rows)
    assert find(report, kernel="conv_forward")["bound_by"] == "bytes"
    fused = roofline(model="vim_tiny", plan="upper:6:9", device=CPU)
    whole, less = (find(found, kernel=STEP)["bound_us"] for found in (report, fused))
    assert 0.6 < less / whole < 0.7  # 64% of the token-layers are left
    json.loads(report.json())


def row(name, arch, slots):
    return Row(
        name=name,
        arch=arch,
        registers=8,
        spill_bytes=0,
        shared_bytes=0,
        loops=(1,),
        slots=slots,
        instructions=9,
    )


def test_instructions_are_those_of_the_shortest_form_for_the_dtype_and_the_state(tmp_path):
    rows = [
        row("scan_forward bf16 N16 BD32", 90, 14.0),
        row("scan_forward bf16 N16 BD64", 90, 10.0),
        row("scan_forward bf16 N16 BD64", 80, 9.0),
        row("scan_forward bf16 N8 BD64", 90, 8.0),
        row("scan_forward fp32 N16 BD64", 90, 7.0),
        row("scan_backward fp32 N16 BD64", 90, 38.0),
    ]
    table = tmp_path / "aot.json"
    table.write_text(Audit(date="", triton="3", command="", rows=tuple(rows)).json())
    found, skipped = issue_slots(table, 90, torch.bfloat16, 16)
    assert found == {"scan_forward": 10.0}
    assert "has none for bfloat16, sm_90" in skipped["instructions of scan_backward"]
    report = roofline(model="vim_tiny", device=CPU, dtype=torch.float32, aot=table)
    assert find(report, kernel="scan_backward")["slots"] == 38.0
    assert find(report, kernel="scan_backward")["bound_by"] == "issue"


def test_without_a_table_instructions_are_left_out_and_said_to_be(tmp_path):
    assert issue_slots(None, 90, torch.float32, 16)[0] == {}
    _, skipped = issue_slots(tmp_path / "no.json", 90, torch.float32, 16)
    assert "there is no " in skipped["instructions"]


@pytest.mark.parametrize(
    ("told", "mhz"),
    [
        ("GPU-aa, 1980\n", 1980),
        ("GPU-bb, 1980\nGPU-aa, 1500\n", 1500),
        ("GPU-bb, 1980\nGPU-cc, 1980\n", 1980),  # a container may see another number
        ("GPU-bb, 1980\nGPU-cc, 1500\n", None),
        ("GPU-aa, [N/A]\n", None),
        ("", None),
    ],
)
def test_the_clock_is_that_of_this_gpu_or_none(monkeypatch, told, mhz):
    done = SimpleNamespace(stdout=told, stderr="", returncode=0)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: done)
    about = SimpleNamespace(uuid="aa")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    if mhz is None:
        with pytest.raises(MeasureError, match=r"clocks\.max\.sm is"):
            module.max_clock_hz(CPU)
    else:
        assert module.max_clock_hz(CPU) == 1e6 * mhz


@pytest.mark.skipif(TRITON.unavailable() is not None, reason="needs triton")
def test_every_kernel_that_is_counted_is_timed(monkeypatch):
    monkeypatch.setattr("roofline.captured", lambda run: run)
    small = Shape(batch=1, length=2, dim=16, inner=32, state=4, rank=2, itemsize=4)
    given = dict(device=CPU, dtype=torch.float32, rounds=1, warmup=0)
    times = kernel_times("vim_micro", "upper:3:8", small, **given)
    assert times.keys() == {*kernel_work(small), "merging", STEP}


@pytest.mark.gpu
def test_floors_stand_beside_times_on_a_gpu():
    report = roofline(model="vim_micro", batch=8, rounds=3, device=torch.device("cuda", 0))
    timed = {row["kernel"] for row in report.rows if row["time_over_bound"] is not None}
    assert {STEP, "merging", "scan_forward", "scan_backward", "norm_backward"} <= timed
