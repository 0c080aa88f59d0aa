"""Whole models under `torch.func` and differentiated twice."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import fambav
import fambav.models
from fambav.ops import BackendError
from fambav.registry import family_of
from fambav.timm_compat import timm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning"),  # by jvp itself
    pytest.mark.filterwarnings("ignore:torch.searchsorted"),  # of layouts, by vmap
]
CASES = [
    ("vim_micro", None),
    ("vim_micro", "famba-v"),
    ("vim_micro", "prune-aligned"),
    ("plainmamba_micro", None),
    ("plainmamba_micro", "famba-v"),
    ("vmamba_nano", None),
]

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
SMALL = dict(depth=2, img_size=16, patch_size=4, num_classes=5)
STAGES = dict(dims=(8, 16), depths=(1, 1), img_size=16, num_classes=5)


def build(name, method):
    torch.manual_seed(0)
    small = STAGES if family_of(name).staged else SMALL
    model = timm.create_model(name, **small).double().eval()
    if method is not None:
        fambav.reduce(model, method, "r:3@1")
    return model


@pytest.mark.parametrize(("name", "method"), CASES)
def test_second_derivatives_and_gradients_of_each_sample(name, method):
    model = build(name, method)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    with fambav.composed():
        each = vmap(grad(loss), in_dims=(None, 0))(parameters, IMAGES)
        wanted = torch.autograd.grad(model(IMAGES).square().sum(), list(model.parameters()))
        for n, want in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(each[n].sum(0), want, msg=lambda m, n=n: f"{n}: {m}")

        direction, images = IMAGES.flip(0), IMAGES.clone().requires_grad_()
        of_images = grad(lambda x: model(x).square().sum())
        forward_over_reverse = jvp(of_images, (IMAGES,), (direction,))[1]
        first = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)[0]
        twice = torch.autograd.grad((first * direction).sum(), images)[0]
    assert twice.any()
    torch.testing.assert_close(twice, forward_over_reverse)


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_kernels_refuse(name):
    model = build(name, None).float()
    with pytest.raises(BackendError, match=r"under a transform of torch\.func"):
        jvp(model, (IMAGES.float(),), (IMAGES.float(),))
    images = IMAGES.float().requires_grad_()
    first = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)[0]
    with pytest.raises(BackendError, match="is differentiated twice"):
        torch.autograd.grad(first.sum(), images)
