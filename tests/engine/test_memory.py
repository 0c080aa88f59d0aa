"""Bytes saved for backward, counted exactly."""

import pytest
import torch
from torch import nn

from fambav.engine.memory import MIB, PeakMemory, SavedBytes, allocated_peak, resident_mib

CPU = torch.device("cpu")


def test_a_chain_of_products_saves_each_tensor_once():
    x = torch.ones(1000, requires_grad=True)
    saved = SavedBytes([x])
    with saved.watch():
        y = x * x
        z = y * y * y
    assert saved.peak_bytes == 2 * 4000  # y, held by three nodes, and y * y
    z.sum().backward()
    assert torch.equal(x.grad, torch.full((1000,), 6.0))


def test_views_of_one_storage_count_once():
    x = torch.ones(100, requires_grad=True)
    saved = SavedBytes([x])
    with saved.watch():
        y = (x * 1).view(10, 10)
        _kept = y.exp() @ y.mT
    assert saved.peak_bytes == 2 * 400  # y (twice), exp(y)


def test_peak_is_of_what_is_held_at_the_same_time():
    weight = torch.ones(1000, requires_grad=True)
    saved = SavedBytes([weight])
    with saved.watch():
        for _ in range(3):
            (weight.exp() * 2).sum().backward()
        assert saved.peak_bytes == 4000
        kept = [weight.exp() for _ in range(3)]
    assert saved.peak_bytes == 12000
    assert len(kept) == 3


def test_an_output_that_its_own_node_saves_is_freed():
    weight = torch.ones(1000, requires_grad=True)
    saved = SavedBytes([weight])
    with saved.watch():
        for _ in range(5):
            weight.exp()  # never used: only its own node holds it
    assert saved.peak_bytes == 4000


def test_parameters_do_not_count():
    model = nn.Linear(50, 50)
    saved = SavedBytes(model.parameters())
    x = torch.ones(1, 50, requires_grad=True)
    with saved.watch():
        _kept = model(x)
    assert saved.peak_bytes == 200  # x


def test_meter_measures_the_update_it_surrounds():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    meter, x = PeakMemory(CPU, model.parameters()), torch.randn(32, 64)
    with meter.first_update():
        model(x).sum().backward()
    first = meter.peak()
    assert first.kind == "saved for backward"
    blind = PeakMemory(CPU, model.parameters(), checkpointed=True)
    assert blind.peak().kind == "saved for backward outside checkpointed blocks"
    assert first.mib == pytest.approx((32 * 64 + 2 * 32 * 256) * 4 / MIB)
    with meter.first_update():
        model(x[:16]).sum().backward()
    model(x).sum().backward()
    assert meter.peak().mib < first.mib


def test_the_allocator_is_asked_for_what_it_holds_at_once():
    there = torch.ones(1000)

    def run():
        first = there + 1
        del first
        second, third = there + 2, there + 3
        return second, third

    assert 2 * 4000 <= allocated_peak(run) < 3 * 4000  # each is rounded up
    assert allocated_peak(lambda: there.add_(1)) < 1000
    assert allocated_peak(lambda: there.view(10, 100)) == 0


@pytest.mark.gpu
def test_graphs_are_measured_by_the_memory_that_they_reserve():
    gpu = torch.device("cuda")
    for replayed, kind in ((False, "cuda allocated"), (True, "cuda reserved")):
        meter = PeakMemory(gpu, [], replayed=replayed)
        with meter.first_update():
            torch.empty(4 * MIB, dtype=torch.uint8, device=gpu)
        assert meter.peak().kind == kind
        assert meter.peak().mib >= 4


def test_resident_size_is_in_mib():
    assert 50 < resident_mib() < 100_000
