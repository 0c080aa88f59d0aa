"""The blocks of docs/other-tools.md, each where its package is installed."""

import re
from pathlib import Path

import pytest
import torch

import fambav.models  # noqa: F401  registers them
from fambav.timm_compat import timm

pytestmark = pytest.mark.filterwarnings("default")  # theirs, and that mixers run unfused
PAGE = (Path(__file__).parents[2] / "docs" / "other-tools.md").read_text(encoding="utf-8")


def blocks(package):
    return [b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if package in b]


def run(block):
    """Execute a block on images; returns its names."""
    torch.manual_seed(0)
    names = dict(images=torch.rand(2, 3, 32, 32))
    exec(compile(block, "docs/other-tools.md", "exec"), names)
    return names


def logits_of(name):
    """What the model of a block answers without its package."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    return timm.create_model(name, num_classes=10).eval()(images)


@pytest.mark.extra("pytorch_grad_cam")
@pytest.mark.parametrize("block", blocks("pytorch_grad_cam"))
def test_heat_maps(block):
    names = run(block)
    assert names["heat"].shape == (2, 32, 32)
    (gradients,) = names["cam"].activations_and_grads.gradients
    assert gradients.shape[0] == 2
    assert gradients.abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.extra("captum")
def test_attributions():
    (block,) = blocks("captum")
    names = run(block)
    assert names["pixels"].shape == (2, 3, 32, 32)
    assert names["pixels"].abs().max() > 0
    assert names["tokens"].shape[-1] == 64


@pytest.mark.extra("torchao")
def test_quantized_weights():
    (block,) = blocks("torchao")
    names = run(block)
    assert len(names["model"].unfused) == 6
    torch.testing.assert_close(names["logits"], logits_of("vim_micro"), atol=0.02, rtol=0)


@pytest.mark.extra("accelerate")
@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro", "groupmamba_nano", "vim2_nano"])
def test_weights_off_the_device(name):
    (block,) = blocks("accelerate")
    logits = run(block.replace("groupmamba_nano", name))["logits"]
    torch.testing.assert_close(logits, logits_of(name), atol=1e-5, rtol=0)
