"""A batch of no images is a batch: whatever comes of it has no rows, and the right width."""

import pytest
import timm
import torch

import fambav
import fambav.models
from fambav.ops import causal_conv1d, match, selective_scan
from fambav.registry import METHODS

NONE = torch.randn(0, 3, 32, 32)


def model(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, img_size=32, depth=4, **options)


@pytest.mark.parametrize("method", ["none", *METHODS])
@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_no_images_give_no_rows_and_gradients_of_zero(name, method):
    net = model(name)
    if method != "none":
        schedule = f"r:{net.grid[0]}@3" if method == "storm" else "r:3@3-4"
        fambav.reduce(net, method, schedule, scan="compact")  # what all models can do
    logits = net(NONE)
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)

    rows, trace = net.eval().forward_features(NONE, trace=True)
    assert rows.shape == (0, net.length, 64)
    assert {source.shape for source in trace.sources} == {(0, net.length)}
    maps = net.forward_intermediates(NONE, [1, 3], intermediates_only=True)
    assert [found.shape for found in maps] == 2 * [(0, 64, *net.grid)]


def test_no_images_give_no_maps_of_stages():
    net = timm.create_model("vmamba_nano", num_classes=10)
    logits = net(NONE)
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert not any(p.grad.any() for p in net.parameters())
    maps = net.forward_intermediates(NONE, intermediates_only=True)
    assert [found.shape[2:] for found in maps] == [stage.grid for stage in net.info.stages]


@pytest.mark.parametrize("scan", ["aligned", "masked"])
def test_no_images_are_scanned_by_every_policy(scan):
    net = fambav.reduce(model("vim_micro", class_token="double"), "ordered", "r:3@2-4", scan=scan)
    assert net(NONE).shape == (0, 10)


def test_operations_take_no_samples():
    u, A, B = torch.randn(0, 4, 5), -torch.rand(4, 2), torch.randn(0, 2, 5)
    y, last = selective_scan(u, u, A, B, B, return_last_state=True)
    assert (y.shape, last.shape) == (u.shape, (0, 4, 2))
    assert causal_conv1d(u, torch.randn(4, 3)).shape == u.shape
    assert [index.shape for index in match(u, 2)] == 2 * [(0, 2)]
