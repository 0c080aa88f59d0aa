"""Turns, ratios and memory; how fast anything is, no test says."""

import pytest
import torch

from fambav.bench import timing
from fambav.bench.timing import (
    allocated_mib,
    first_ms,
    interleave,
    peak_mib,
    quartiles,
    ratio,
    ratios,
    spread,
    with_replays,
)

CPU = torch.device("cpu")


def test_every_candidate_runs_once_in_every_round():
    turns = []
    runs = {name: (lambda name=name: turns.append(name)) for name in "ab"}
    times = interleave(runs, rounds=3, warmup=1, device=CPU)
    assert turns == list("abababab")
    assert {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for own in times.values() for value in own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rounds=0, warmup=1), "rounds is 0, expected at least 1"),
        (dict(rounds=1, warmup=-1), "warmup is -1, expected at least 0"),
    ],
)
def test_too_few_rounds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        interleave({}, device=CPU, **options)


def test_ratios_are_taken_within_a_round():
    assert ratio([3.0, 8.0, 8.0], [1.0, 2.0, 4.0]) == 3.0
    assert ratios([3.0, 8.0, 8.0], [1.0, 2.0, 4.0]) == [3.0, 4.0, 2.0]
    assert ratio(None, [1.0]) is None
    assert ratio([1.0], None) is None


def test_medians_come_with_quartiles():
    assert spread([3.0, 1.0, 2.0]) == {"median_ms": 2.0, "quartiles_ms": (1.0, 3.0)}
    assert (*quartiles([1.0, 2.0, 3.0]),) == (1.0, 2.0, 3.0)
    assert spread([5.0]) == {"median_ms": 5.0, "quartiles_ms": (5.0, 5.0)}


def test_memory_counts_each_storage_once_and_no_leaf():
    x, y = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)

    def run():
        product = x * y  # keeps the leaves
        return (product[:5].sin() + product[5:].sin()).sum()  # keeps one storage by two views

    assert peak_mib(run, CPU, ignored=[x, y]) * 2**20 == 40
    assert peak_mib(run, CPU) * 2**20 == 120


def test_only_a_gpu_replays_and_what_cannot_be_recorded_is_named(monkeypatch):
    def captured(run):
        if run is None:
            raise RuntimeError("a copy to the host\nand its traceback")
        return run

    monkeypatch.setattr(timing, "captured", captured)
    runs = {("triton", 5): len, ("cpu", 5): None}
    assert with_replays(runs, CPU) == ({("triton", "eager", 5): len, ("cpu", "eager", 5): None}, {})
    found, refused = with_replays(runs, torch.device("cuda"))
    assert list(found) == [("triton", "eager", 5), ("triton", "replayed", 5), ("cpu", "eager", 5)]
    assert refused == {"cpu replayed 5": "a copy to the host"}


def test_the_first_call_is_timed_once_and_a_call_alone_is_not_repeated(monkeypatch):
    waited, turns = [], []
    monkeypatch.setattr(timing, "settle", waited.append)
    gpu = torch.device("cuda")
    assert first_ms(lambda: turns.append("first"), gpu) >= 0
    interleave({"a": lambda: turns.append("a")}, rounds=2, warmup=0, device=gpu, alone=True)
    assert turns == ["first", "a", "a"]
    assert waited == [gpu] * 6  # before and after each


def test_memory_of_a_pass_without_gradients_is_what_it_allocates():
    x = torch.ones(2**16)
    assert allocated_mib(lambda: x + 1, CPU) == pytest.approx(0.25, rel=1e-3)


@pytest.mark.gpu
def test_a_replay_does_what_was_recorded():
    x = torch.ones(4, device="cuda")
    run = timing.captured(lambda: x.add_(1))
    before = x.clone()
    run()
    assert torch.equal(x, before + 1)


@pytest.mark.gpu
def test_memory_on_a_gpu_is_what_is_allocated_above_what_was_there():
    there = torch.ones(2**20, device="cuda")
    gpu = torch.device("cuda")
    assert peak_mib(lambda: torch.empty(2**18, device="cuda"), gpu) == pytest.approx(1)
    del there
