"""Operations and bytes are counted, and compared with the peaks of a device."""

import pytest
import torch

from fambav.bench import roofline
from fambav.bench.candidates import Candidate, images
from fambav.bench.roofline import Roofline, flops, mixer_bytes, traffic
from fambav.ops.kernels import NUMBA

CPU = torch.device("cpu")


def test_every_tensor_is_read_once_and_every_result_written_once():
    x, y = torch.ones(10, 20), torch.ones(20, 30)
    assert traffic(lambda: x @ y) == 4 * (200 + 600 + 300)
    assert traffic(lambda: x.add_(1)) == 4 * (200 + 200)
    assert traffic(lambda: x.copy_(y[0, :20])) == 4 * (20 + 200)
    assert traffic(lambda: torch.empty(100).zero_()) == 4 * 100


def test_views_and_what_is_repeated_cost_nothing():
    x = torch.ones(10, 20)
    assert traffic(lambda: x.view(200)[:5].unsqueeze(0).expand(9, 5)) == 0
    one = torch.ones(1, 20)
    assert traffic(lambda: x + one.expand(10, 20)) == 4 * (200 + 20 + 200)


def test_lists_that_are_changed_in_place_are_read_and_written():
    weights = [torch.ones(5), torch.ones(7)]
    assert traffic(lambda: torch._foreach_add_(weights, 1.0)) == 2 * 4 * 12


def test_a_backward_pass_is_counted():
    x = torch.ones(10, requires_grad=True)
    forward = traffic(lambda: (x * x).sum())
    assert traffic(lambda: (x * x).sum().backward()) > 2 * forward


@pytest.mark.skipif(NUMBA.unavailable() is not None, reason="needs numba")
def test_inside_the_fused_mixer_kernels_and_products_are_counted():
    net = Candidate("vim_micro", backend="numba").network(CPU).eval()
    x = torch.ones(1, net.length, net.dim)
    mixer = net.layers[0].mixer
    rank, state, _ = mixer.splits
    sizes = dict(batch=1, length=net.length, dim=net.dim, inner=2 * net.dim, itemsize=4)
    counted = mixer_bytes(**sizes, state=state, rank=rank, keep=False, kernels="numba")
    with torch.no_grad():
        seen = traffic(lambda: mixer(x))
    around = 3 * x.nbytes  # in_proj reads tokens and writes twice the inner width, four times them
    weights = sum(p.nbytes for p in mixer.parameters())
    least = counted["forward"] + around + weights
    assert least < seen < 1.3 * least
    both = traffic(lambda: mixer(x).sum().backward())
    assert both > seen + counted["backward"] + 2 * weights


def test_each_set_of_kernels_keeps_states_at_its_own_interval():
    sizes = dict(batch=1, length=65, dim=8, inner=16, state=4, rank=1, itemsize=4)
    ways = {name: mixer_bytes(**sizes, keep=True, kernels=name) for name in ("triton", "numba")}
    one = 2 * 16 * 4 * 4  # float32 states of both directions
    assert ways["triton"]["backward"] - ways["numba"]["backward"] == (4 - 3) * one
    assert ways["triton"]["forward"] - ways["numba"]["forward"] == (4 - 3) * one


def test_the_operations_of_a_peer_are_those_of_its_products():
    assert flops(Candidate("deit_tiny_patch16_224")) == pytest.approx(2 * 1.254e9, rel=1e-3)


def test_our_operations_are_two_for_a_product_and_those_of_all_scans():
    net = Candidate("vim_tiny").network(torch.device("meta"))
    scans = 2 * 24 * 197 * 384 * (9 * 16 + 2)
    products = flops(Candidate("vim_tiny")) - scans
    assert products == pytest.approx(2 * 1.293e9, rel=1e-3)
    assert net.length == 197
    assert flops(Candidate("vim_tiny", "upper:6:9")) < 0.7 * flops(Candidate("vim_tiny"))


def test_images_have_the_size_that_the_model_reads():
    net = Candidate("vim_micro").network(CPU)
    assert images(net, 2, CPU).shape == (2, 3, 32, 32)


def test_shares_of_peaks_are_taken_within_each_round(monkeypatch):
    monkeypatch.setattr(roofline, "SIDE", {"cpu": 100})
    monkeypatch.setattr(roofline, "COPIED", {"cpu": 1000})
    limits = Roofline(CPU, [torch.float32])
    product, copy = limits.runs()
    assert all(run() is not None for run in limits.runs().values())
    # The machine is half as fast in the second round, for all alike.
    times = {"own": [4.0, 8.0], product: [2.0, 4.0], copy: [1.0, 2.0]}
    x = torch.ones(50)
    row = limits.row(times, "own", torch.float32, batch=2, flops=5e5, run=lambda: x + 1)
    assert row["mib_moved"] == 400 / 2**20
    assert row["flops_share"] == pytest.approx(1e6 / 2e6 * 2 / 4)
    assert row["bytes_share"] == pytest.approx(400 / 2000 * 1 / 4)
    assert row["gflop_per_s"] == pytest.approx(1e6 / 6e-3 / 1e9)
    rates = {rate["what"]: rate["giga_per_s"] for rate in limits.tables(times)["roofline"]}
    assert rates == pytest.approx({"product in float32": 2e6 / 3e6, "copy": 2000 / 1.5e6})
    assert limits.flops_per_s(times, torch.float32) == pytest.approx(2e6 / 3e-3)
    assert limits.bytes_per_s(times) == pytest.approx(2000 / 1.5e-3)
    assert Roofline(CPU, []).tables(times) == {}
    few = Roofline(CPU, []).row(times, "own", torch.float32, batch=2, flops=5e5, run=lambda: 1 / 0)
    assert few.keys() == {"gflop_per_image", "gflop_per_s"}
