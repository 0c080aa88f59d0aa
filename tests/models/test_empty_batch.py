"""A batch of no images is a batch: whatever comes of it has no rows, and the right width."""

import pytest
import timm
import torch

import fambav
import fambav.models
from fambav.ops import causal_conv1d, selective_scan
from fambav.registry import METHODS

MODELS = ("vim_micro", "plainmamba_micro")


def model(name, method="none", **options):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, img_size=32, **options).eval()
    if method != "none":
        schedule = f"r:{net.grid[0]}@3" if method == "storm" else "r:3@3-4"
        scan = {"scan": "compact"} if name.startswith("plain") else {}  # what all models can do
        fambav.reduce(net, method, schedule, **scan)
    return net


@pytest.mark.parametrize("method", ["none", *METHODS])
@pytest.mark.parametrize("name", MODELS)
def test_no_images_give_no_logits(name, method):
    net = model(name, method)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert net(images[:0]).shape == (0, 10)
        assert net.forward_features(images[:0]).shape == (
            0,
            *net.forward_features(images).shape[1:],
        )
        assert net(images).shape == (2, 10)


@pytest.mark.parametrize("name", MODELS)
def test_no_images_give_maps_without_rows(name):
    net = model(name)
    maps = net.forward_intermediates(torch.randn(0, 3, 32, 32), intermediates_only=True)
    assert {found.shape[0] for found in maps} == {0}


@pytest.mark.parametrize("class_token", ["head", "double", "none"])
def test_no_images_wherever_the_class_token_stands(class_token):
    net = model("vim_micro", "ordered", class_token=class_token)
    assert net(torch.randn(0, 3, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize("method", ["none", "famba-v", "ordered"])
@pytest.mark.parametrize("name", MODELS)
def test_no_images_give_gradients_of_zero(name, method):
    net = model(name, method).train()
    net(torch.randn(0, 3, 32, 32)).sum().backward()
    found = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(not gradient.any() for gradient in found)


def test_features_of_no_images_have_no_rows():
    net = timm.create_model("vim_micro", features_only=True, out_indices=[1, 3], img_size=32)
    assert [len(found) for found in net(torch.randn(0, 3, 32, 32))] == [0, 0]


def test_operations_take_no_samples():
    u, A, B = torch.randn(0, 4, 5), -torch.rand(4, 2), torch.randn(0, 2, 5)
    y, last = selective_scan(u, u, A, B, B, return_last_state=True)
    assert (y.shape, last.shape) == (u.shape, (0, 4, 2))
    assert causal_conv1d(u, torch.randn(4, 3)).shape == u.shape
