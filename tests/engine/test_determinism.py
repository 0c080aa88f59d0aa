"""Deterministic training repeats itself bit for bit, also by CUDA graphs, and what that costs."""

import statistics

import pytest
import torch

from fambav.bench.candidates import EAGER, REPLAYED, Candidate
from fambav.bench.passes import training
from fambav.bench.report import training_dtype
from fambav.bench.timing import interleave, ratio
from fambav.engine.precision import determinism_settings


def made(device, launch=EAGER):
    """A fused model and what trains it: small on a CPU, of the paper's size on a GPU."""
    gpu = device == "cuda"
    model, plan = ("vim_tiny", "upper:6:9") if gpu else ("vim_micro", "upper:3:8")
    device = torch.device(device)
    candidate = Candidate(model, plan, dtype=training_dtype(device), launch=launch)
    return training(candidate, batch=16 if gpu else 2, device=device)


def trained(device, updates, launch=EAGER):
    """Losses and weights after some updates."""
    step = made(device, launch)
    losses = [step.update(iter([step.batch]), number) for number in range(updates)]
    return {"losses": torch.stack(losses), **step.net.state_dict()}


@pytest.mark.parametrize(
    ("device", "launch", "updates"),
    [
        ("cpu", EAGER, 2),
        pytest.param("cuda", EAGER, 50, marks=pytest.mark.gpu),
        pytest.param("cuda", REPLAYED, 50, marks=pytest.mark.gpu),
    ],
)
def test_updates_from_one_seed_give_equal_bits(device, launch, updates):
    with determinism_settings(deterministic=True, matmul_precision="highest"):
        first, second = trained(device, updates), trained(device, updates, launch)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert first["losses"].isfinite().all()
    assert first["losses"].unique().numel() > 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_cost_of_determinism_is_told(device, record_property):
    step, seen = made(device), set()

    def run(deterministic):
        with determinism_settings(deterministic=deterministic, matmul_precision="highest"):
            seen.add((deterministic, torch.are_deterministic_algorithms_enabled()))
            step.run()

    torch.use_deterministic_algorithms(False)
    runs = {kind: lambda kind=kind: run(kind) for kind in (True, False)}
    rounds = 50 if device == "cuda" else 1
    times = interleave(runs, rounds=rounds, warmup=2, device=torch.device(device))
    assert seen == {(True, True), (False, False)}
    cost = ratio(times[True], times[False])
    exact, free = (statistics.median(times[kind]) for kind in (True, False))
    record_property("times_as_long", cost)
    print(f"a deterministic step takes {exact:.2f} ms, another {free:.2f} ms: {cost:.3f} times")
