"""What a benchmark reports; how fast anything is, no test says."""

import json

import pytest
import torch

from fambav import benchmark

LENGTH = 70


@pytest.fixture(scope="module")
def report():
    return benchmark.scan(batch=1, length=LENGTH, dim=4, state=2, rounds=3, warmup=0)


def test_every_backend_that_runs_here_is_timed_and_the_others_are_named(report):
    assert [row.backend for row in report.rows] == ["cpu", "reference"]
    for row in report.rows:
        low, high = row.quartiles_ms
        assert 0 < low <= row.median_ms <= high
        assert row.growth > 0
    assert "a tensor is on cpu, expected a CUDA device" in report.skipped["cuda"]


def test_speed_is_relative_to_the_loop_in_the_same_round():
    times = {"cpu": [1.0, 2.0, 4.0], "reference": [3.0, 8.0, 8.0]}
    row = benchmark._row("cpu", times, saved=1 << 21, growth=1.5)
    assert (row.median_ms, row.speed, row.saved_mib, row.growth) == (2.0, 3.0, 2.0, 1.5)
    assert benchmark._row("reference", times, saved=0, growth=1.0).speed == 1


def test_growth_is_one_where_time_is_proportional_to_length(monkeypatch):
    def interleave(candidates, *, rounds, warmup, device):
        del rounds, warmup, device
        tokens = {name: run().shape[1] for name, (run, _) in candidates.items()}
        return {name: [7.0 * n**power for power in (1, 1, 2)] for name, n in tokens.items()}

    monkeypatch.setattr(benchmark, "_interleave", interleave)
    report = benchmark.scan(batch=1, length=130, dim=4, state=2)
    assert [row.growth for row in report.rows] == [1.0, 1.0]


def test_memory_counts_each_storage_once_and_no_leaf():
    x, y = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)

    def run():
        product = x * y  # keeps the leaves
        return (product[:5].sin() + product[5:].sin()).sum()  # keeps one storage by two views

    assert benchmark._saved_bytes(run, [x, y]) == 40
    assert benchmark._saved_bytes(run, []) == 120


def test_the_chunks_keep_less_than_a_quarter_of_what_the_loop_keeps(report):
    chunks, loop = (report.row(name).saved_mib for name in ("cpu", "reference"))
    assert 0 < 4 * chunks <= loop


def test_a_report_can_be_read_and_parsed(report):
    text = report.text()
    assert "batch 1, length 70, dim 4, state 2" in text
    for row in report.rows:
        assert f"{row.backend:<12}{row.median_ms:>10.1f}" in text
    for name, reason in report.skipped.items():
        assert f"{name:<12}not run: {reason}" in text
    parsed = json.loads(report.json())
    assert parsed["settings"]["threads"] == torch.get_num_threads()
    assert len(parsed["rows"]) == len(report.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(length=65), "length is 65, expected more than 65"),
        (dict(rounds=0), "rounds is 0, expected at least 1"),
        (dict(batch=-1), "batch is -1, expected at least 1"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.scan(**arguments)
