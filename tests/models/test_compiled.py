"""Whole models under torch.compile: one graph, the same numbers."""

import shutil
import sys

import pytest
import timm
import torch
import torch.nn.functional as F

import fambav.models  # noqa: F401  registers them
from fambav.ops import force
from tests.ops.agreement import device_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own


def gradients(run, net, images, targets):
    """The loss, and the gradient of every parameter, of one step that starts from one seed."""
    torch.manual_seed(0)
    loss = F.cross_entropy(run(images), targets)
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


# With those of the default compiler numba and cpu have each method; numba takes no low precision.
CASES = [("triton", "famba-v", True), ("numba", "ordered", False), ("cpu", "ordered", True)]


@pytest.mark.parametrize(("backend", "method", "low"), CASES)
def test_a_fused_model_in_training_is_one_graph(backend, method, low):
    check(backend, method, low, "aot_eager")


@pytest.mark.slow
@pytest.mark.xdist_group("inductor")  # which prepares C++ headers once in a process, for 20 seconds
@pytest.mark.parametrize("backend", ["numba", "cpu"])
def test_a_fused_model_is_one_graph_to_the_default_compiler_too(backend, tmp_path, monkeypatch):
    # What it compiled under other settings of the processor would be taken from the common folder.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if shutil.which("g++") is None:
        pytest.skip("outside: there is no C++ compiler")
    limit = sys.getrecursionlimit()
    try:
        with torch._inductor.config.patch(compile_threads=1):
            check(backend, "famba-v", False, "inductor")
    finally:
        sys.setrecursionlimit(limit)  # which the compiler raises for the whole process


def check(backend, method, low, compiler):
    """Compare a training step with and without a compiler, in autocast if `low`."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    # The default compiler takes seconds for each of equal layers.
    device, depth = device_of(backend), 1 if compiler == "inductor" else 2
    net = timm.create_model(
        "vim_micro",
        num_classes=10,
        img_size=8,
        dim=16,
        depth=depth,
        drop_path_rate=0.2,
        fusion_strategy="all",
        fusion_token=1,
        fusion_method=method,
    ).to(device)
    images, targets = torch.randn(2, 3, 8, 8, device=device), torch.tensor([3, 7], device=device)
    compiled = torch.compile(net, fullgraph=True, backend=compiler)
    with force(backend), torch.autocast(device, torch.bfloat16, enabled=low):
        want = gradients(net, net, images, targets)
        got = gradients(compiled, net, images, targets)
    for x, y in zip(got, want, strict=True):
        scale = y.abs().max()
        assert (x - y).abs().max() <= (2e-2 if low else 2e-5) * scale
