"""Scans, blocks and steps by every backend that runs here."""

import pytest
import torch

from fambav.bench import operations
from fambav.bench.candidates import Candidate, image_size, relative, use_backend
from fambav.bench.operations import Inputs, block, composed, scan
from fambav.bench.passes import step, training
from fambav.ops import BackendError, backends, causal_conv1d, force
from fambav.ops.causal_conv1d import CAUSAL_CONV1D
from fambav.ops.kernels import NUMBA
from tests.bench import find

CPU = torch.device("cpu")
QUICK = dict(rounds=3, warmup=0, device=CPU)
SHORT = dict(batch=1, lengths=(9, 5))
RUNS = [name for op, name, reason in backends() if op == "selective_scan" and not reason]
HERE = [name for name in ("numba", "cpu", "reference") if name in RUNS]
MADE = {
    "scan": lambda **rest: scan(dim=8, state=2, **rest),
    "block": lambda **rest: block(model="vim_micro", **rest),
    "step": lambda **rest: step(model="vim_micro", **rest),
}


@pytest.fixture(scope="module", params=MADE)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def report(kind):
    return MADE[kind](**SHORT, **QUICK)


def test_every_backend_that_suits_a_cpu_is_timed_at_every_length(kind, report):
    wanted = HERE[:-1] if kind == "step" else HERE  # a whole step by the reference would not fit
    assert [(row["backend"], row["length"]) for row in report.rows] == [
        (name, length) for name in wanted for length in (9, 5)
    ]
    for row in report.rows:
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["peak_mib"] > 0
        assert row["launch"] == "eager"
    longest = find(report, backend="cpu", length=9)
    assert longest["growth"] == longest["over_cpu"] == 1


def test_what_cannot_run_is_absent_with_its_reason(report):
    assert "expected a CUDA device" in report.skipped["cuda"]
    assert all(row["over_cuda"] is None for row in report.rows)


def test_the_fused_scan_keeps_less_than_the_loop():
    found = MADE["scan"](**SHORT, **QUICK)
    for name in HERE[:-1]:
        ours, loop = (find(found, backend=n, length=9)["peak_mib"] for n in (name, "reference"))
        assert 0 < ours < loop


def test_a_backend_that_is_asked_for_runs_alone():
    found = scan(dim=4, state=1, names=["reference"], **SHORT, **QUICK)
    assert {row["backend"] for row in found.rows} == {"reference"}
    assert all(row["over_cpu"] is None for row in found.rows)


def test_ratios_of_backends_and_growth_are_taken_within_a_round():
    short, long, theirs = [2.0, 2.0], [4.0, 4.0], [12.0, 12.0]
    found = relative(short, {"cuda": theirs, "cpu": None}, (long, 60), 20, 7.0)
    assert found == {"over_cuda": 6.0, "over_cpu": None, "peak_mib": 7.0, "growth": 1.5}
    assert relative(long, {}, (long, 60), 60, None)["growth"] == 1
    assert relative(short, {}, (None, 60), 20, None)["growth"] is None
    assert relative(short, {}, (long, 60), None, None)["growth"] is None


@pytest.mark.skipif(NUMBA.unavailable() is not None, reason="needs numba")
def test_the_kernels_called_directly_compute_what_the_composition_does():
    x = Inputs.draw(2, 7, 8, 3, device=CPU, dtype=torch.float32)
    dz, du, ddelta, dprojected, (dA, dD, dbias) = x.backward("numba")
    dB, dC = (weight.squeeze(3) for weight in x.weights(dprojected))
    leaves = x.leaves(by_channel=False)
    with force("reference"):
        z, *rest = torch.autograd.grad(composed(leaves), leaves, x.grad.mT)
    torch.testing.assert_close(dz, z.mT, rtol=1e-4, atol=1e-5)
    for k, found in enumerate(zip(du, ddelta, dA, dB, dC, dD, dbias, strict=True)):
        for ours, theirs in zip(found, rest[7 * k : 7 * k + 7], strict=True):
            theirs = theirs.mT if theirs.shape != ours.shape else theirs
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lengths=()), "length is 0, expected at least 1"),
        (dict(lengths=(5, 0)), "length is 0, expected at least 1"),
        (dict(batch=-1), "batch is -1, expected at least 1"),
        (dict(rounds=0), "rounds is 0, expected at least 1"),
    ],
)
def test_impossible_sizes_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        MADE[kind](**SHORT | QUICK | arguments)


def test_a_backend_is_forced_for_all_operations_that_have_it_and_no_other():
    x, weight = torch.ones(1, 4, 3), torch.ones(4, 2)
    free = CAUSAL_CONV1D.pick(x, weight)
    with use_backend("reference"):
        assert CAUSAL_CONV1D.pick(x, weight) is CAUSAL_CONV1D["reference"].run
    with use_backend("cuda"):  # its convolution is not installed
        assert CAUSAL_CONV1D.pick(x, weight) == free
        causal_conv1d(x, weight)
    with use_backend(None):
        assert CAUSAL_CONV1D.pick(x, weight) == free
    with pytest.raises(BackendError, match="expected one of"), use_backend("cpuu"):
        pass


def test_an_interpreter_is_timed_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(operations, "BACKENDS", {"cpu": ("triton", "cpu")})
    monkeypatch.setattr(operations, "interpreted", lambda: True)
    found = scan(dim=4, state=1, **SHORT, **QUICK)
    assert {row["backend"] for row in found.rows} == {"cpu"}
    assert found.skipped == {"triton": "TRITON_INTERPRET is set"}
    monkeypatch.setattr(operations, "KERNEL_SETS", ())  # by a scan that need not be interpreted
    monkeypatch.setattr(operations, "use_backend", lambda _: force("reference"))
    found = scan(dim=4, state=1, names=["triton"], **SHORT, **QUICK)
    assert {row["backend"] for row in found.rows} == {"triton"}


@pytest.mark.parametrize(
    ("length", "size"),
    [(197, (224, 224)), (130, (48, 688)), (65, (128, 128)), (29, (64, 112)), (2, (16, 16))],
)
def test_images_get_the_size_that_makes_so_many_tokens(length, size):
    assert image_size("vim_tiny", length) == size


def test_a_step_cannot_have_the_class_token_alone():
    with pytest.raises(ValueError, match="length is 1, expected at least 2"):
        image_size("vim_tiny", 1)


def test_a_step_is_an_update_of_the_weights():
    made = training(Candidate("vim_micro", length=5), batch=2, device=CPU)
    before = made.net.head.weight.detach().clone()
    assert made.run().isfinite()
    assert not torch.equal(made.net.head.weight, before)
    assert made.net.length == 5
    assert made.peak_mib() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_gpu_times_launches_and_replays(made):
    gpu = torch.device("cuda", 0)
    more = {"cuda_graphs": True} if made is MADE["step"] else {}
    report = made(**SHORT, **QUICK | dict(device=gpu), names=["triton"], **more)
    assert report.skipped == {}
    assert {(row["launch"], row["length"]) for row in report.rows} == {
        (launch, length) for launch in ("eager", "replayed") for length in (9, 5)
    }
    assert all(row["median_ms"] > 0 for row in report.rows)
