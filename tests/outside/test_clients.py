"""The blocks of docs/other-tools.md, each where its package is installed."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fambav.models  # noqa: F401  registers them
from fambav.timm_compat import timm

pytestmark = pytest.mark.filterwarnings("default")  # theirs, and that mixers run unfused
PAGE = (Path(__file__).parents[2] / "docs" / "other-tools.md").read_text(encoding="utf-8")


def blocks(package):
    return [b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if package in b]


def run(block, **names):
    """Execute a block on images; returns its names."""
    torch.manual_seed(0)
    names |= dict(images=torch.rand(2, 3, 32, 32))
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


@pytest.mark.extra("lightning")
def test_a_training_loop():
    (block,) = blocks("lightning")
    trainer = run(block)["trainer"]
    assert trainer.global_step == 1
    assert trainer.model.model.head.weight.dtype is torch.bfloat16


def one_of_two(rank, folder, block):
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = timm.create_model("vim_micro", num_classes=10)
    names = run(block, model=model, mesh=init_device_mesh("cpu", (2,)))
    logits = model(names["images"])
    logits.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: getattr(grad, "full_tensor", lambda g=grad: g)() for name, grad in grads.items()}
    torch.save((logits.detach(), whole), folder / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("block", blocks("torch.distributed"), ids=["fsdp2", "tensor-parallel"])
def test_weights_in_shards(block, tmp_path):
    start = torch.multiprocessing.start_processes
    start(one_of_two, (tmp_path, block), nprocs=2, start_method="fork")
    torch.manual_seed(0)
    model = timm.create_model("vim_micro", num_classes=10)
    logits = model(run("")["images"])
    logits.square().mean().backward()
    for rank in range(2):
        sharded, grads = torch.load(tmp_path / f"{rank}.pth")
        torch.testing.assert_close(sharded, logits.detach(), rtol=1e-5, atol=1e-6)
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
