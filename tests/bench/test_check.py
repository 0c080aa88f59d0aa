"""The check of kernels finds what is wrong with them."""

from types import SimpleNamespace

import pytest
import torch

from fambav.bench import cases, check
from fambav.bench.commands import PARTS
from fambav.bench.report import MeasureError
from fambav.ops.kernels import NUMBA, TRITON

CPU = torch.device("cpu")
LENGTHS = (1, 2, 5)
SETS = [
    pytest.param(
        s.name, marks=pytest.mark.skipif(s.missing() is not None, reason=f"needs {s.name}")
    )
    for s in (NUMBA, TRITON)
]
needs_numba = pytest.mark.skipif(NUMBA.missing() is not None, reason="needs numba")


@pytest.mark.parametrize("kernels", SETS)
def test_every_kernel_of_a_set_is_compared_and_right(kernels):
    parts = [part for part in check.PARTS if "scan" not in part and part != "mixer"]
    if kernels == "numba":  # which is not interpreted, and so can do the larger ones
        parts = [part for part in check.PARTS if part != "scan_large"]
    report = check.check(parts=parts, kernels=kernels, lengths=LENGTHS, device=CPU)
    assert report.failures == ()
    tried = {row["part"] for row in report.rows}
    assert tried | report.skipped.keys() == set(parts)
    assert {"conv", "gate"} <= tried
    assert kernels == "triton" or {"scan", "scan_forms", "mixer"} <= tried
    for row in report.rows:
        assert 0 <= row["worst_error"] <= row["limit"]
        assert row["lengths"] == len(LENGTHS)
    if kernels == "triton":
        assert tried == set(parts)
        assert {row["dtype"] for row in report.rows} == {"float32", "bfloat16", "float16"}


def test_scans_of_the_interpreter_are_right():
    if TRITON.missing() is not None:
        pytest.skip("needs triton")
    row = check._row("scan_forms", "triton", (2,), CPU, torch.float32)
    assert row["right"]


@needs_numba
def test_scans_as_large_as_in_training_are_compared_with_chunks(monkeypatch):
    monkeypatch.setattr(cases, "LARGE", cases.LARGE._replace(dim=16, batch=3))
    monkeypatch.setattr(cases, "CPU", torch.device("cpu", 0))  # so that the chunks are taken
    found = cases.scan_large("numba", 9, CPU, torch.float32)
    assert max(check.error(*pair) for pair in found.values()) < 1e-5
    assert found["dA"][0].shape == (2, 16, 16)


class Spoiled:
    """A set of kernels one of which does something else as well."""

    def __init__(self, name, spoil):
        self._set, self._name, self._spoil = NUMBA.load(), name, spoil

    def load(self):
        def spoiled(*given, **options):
            found = getattr(self._set, self._name)(*given, **options)
            return self._spoil(found, given)

        return SimpleNamespace(**{**vars(self._set), self._name: spoiled})


def unwritten(found, given):
    given[3][0, 0, 0].fill_(torch.nan)  # what it was before conv_forward wrote it
    return found


def slightly_off(found, given):
    given[3].mul_(1.001)
    return found


class Racing:
    """Gives other bits at every second call."""

    calls = 0

    def __call__(self, found, given):
        self.calls += 1
        dA, *rest = found
        return (dA * (1 + 1e-6 * (self.calls % 2)), *rest)


@needs_numba
@pytest.mark.parametrize(
    ("part", "kernel", "spoil", "tensor"),
    [
        ("conv", "conv_forward", unwritten, "u"),
        ("conv", "conv_forward", slightly_off, "u"),
        ("scan", "scan_backward", Racing(), "dA"),
        ("conv", "conv_backward", Racing(), "dweight"),
    ],
)
def test_what_is_unwritten_wrong_or_not_repeated_is_found(monkeypatch, part, kernel, spoil, tensor):
    monkeypatch.setattr(cases, "kernel_set", lambda _: Spoiled(kernel, spoil))
    report = check.check(parts=(part,), kernels="numba", lengths=(3,), device=CPU)
    (row,) = report.rows
    assert not row["right"]
    assert row["where"] == f"{tensor} at length 3"
    assert report.failures[0].startswith(f"{part} in float32 is off by ")


def test_the_parts_are_those_of_the_command_line():
    assert (*check.PARTS, check.TRAINING) == PARTS


def test_nan_and_another_shape_are_infinitely_wrong():
    ones = torch.ones(2)
    assert check.error(ones, ones) == 0
    assert check.error(ones * 1.5, ones * 2) == 0.25
    assert check.error(torch.tensor([1.0, torch.nan]), ones) == float("inf")
    assert check.error(torch.ones(3), ones) == float("inf")
    assert check.error(ones, torch.zeros(2)) == 1


def test_training_is_done_twice_and_every_bit_compared(monkeypatch):
    report = check.check(parts=("training",), updates=2, batch=2, kernels="numba", device=CPU)
    (row,) = report.rows
    assert (row["part"], row["right"], row["worst_error"]) == ("training again", True, 0)
    (cost,) = report.tables[check.COST]
    assert cost["rounds"] == 2
    assert cost["ratio"] > 0
    assert "deterministic ms" in report.text()
    made = check.training

    def drifting(*given, **options):
        step = made(*given, **options)
        step.net.head.weight.data.mul_(1 + drifting.calls)
        drifting.calls += 1
        return step

    drifting.calls = 0
    monkeypatch.setattr(check, "training", drifting)
    report = check.check(parts=("training",), updates=1, batch=2, kernels="numba", device=CPU)
    assert report.failures
    assert report.rows[0]["where"] == "losses"


def test_the_cost_of_repeating_is_measured_against_steps_that_need_not(monkeypatch):
    made, seen = check.training, set()

    def watched(*given, **options):
        step = made(*given, **options)

        def update(*given):
            seen.add(torch.are_deterministic_algorithms_enabled())
            return step.update(*given)

        return step._replace(update=update)

    monkeypatch.setattr(check, "training", watched)
    torch.use_deterministic_algorithms(False)
    check.check(parts=("training",), updates=1, batch=2, kernels="numba", device=CPU)
    assert seen == {True, False}


def test_a_set_that_cannot_run_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(check, "kernel_set", lambda _: TRITON._replace(installed=False))
    with pytest.raises(MeasureError, match="kernels are triton, expected some that can run here"):
        check.check(parts=("conv",), kernels="triton", device=CPU)


def test_all_lengths_are_tried_for_the_scan_in_float32(monkeypatch):
    seen = {}

    def row(name, kernels, lengths, device, dtype):
        seen[name, dtype] = lengths
        return {"right": True}

    monkeypatch.setattr(check, "_row", row)
    monkeypatch.setattr(check, "kernel_set", lambda _: TRITON._replace(device="cpu"))
    monkeypatch.setattr(
        check, "backends", lambda: [(p.op, "x", None) for p in check.PARTS.values()]
    )
    monkeypatch.setattr(TRITON.__class__, "missing", lambda _: None)
    check.check(parts=("scan", "norm"), kernels="x", device=CPU)
    assert list(seen.pop(("scan", torch.float32))) == list(range(1, 258))
    assert len(seen) == 5
    assert all(lengths == check.SPREAD for lengths in seen.values())


@pytest.mark.gpu
@pytest.mark.slow
def test_kernels_are_right_on_this_gpu():
    assert check.check(lengths=(1, 16, 65, 197), device=torch.device("cuda")).failures == ()
