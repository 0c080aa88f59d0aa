"""How many kernels a block of Vim launches on a GPU, counted where Triton's are interpreted."""

from collections import Counter
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fambav.layers import Block, Mamba, Tokens
from fambav.ops import force

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used")

MOST = 35  # of a forward and a backward pass
FREE = {"promote_types", "_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided"}
OURS = {
    f"fambav::{name}{way}": getattr(import_module(f"fambav.ops.{module}"), function)
    for name, module in (("add_rms_norm", "add_rms_norm"), ("bimamba_scan", "fused_bimamba"))
    for way, function in (("", "_forward"), ("_backward", "_backward"))
}


class Launches(TorchDispatchMode):
    """Counts operations that are no views, those inside our operators included."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            self.counts[executor.fn.__name__] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return launch(executor, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in OURS:
            with self:
                return OURS[name]._init_fn(*args, **(kwargs or {}))
        if not func.is_view and name.split("::")[1] not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch):
    """Launches of a training step of a block under autocast, between other blocks."""
    block = Block(32, Mamba(32, depth=2), drop_path=0.3).train()
    x = torch.randn(2, 3, 32).bfloat16().requires_grad_()
    residual = torch.randn(2, 3, 32).requires_grad_()
    launches = Launches(monkeypatch)
    with force("triton"), force("triton", "add_rms_norm"), launches:
        with torch.autocast("cpu", torch.bfloat16):
            out = block(Tokens(x, residual, None, None, None))
        before = launches.counts.copy()
        torch.autograd.backward([out.x, out.residual], [x.detach(), residual.detach()])
    assert all(p.grad is not None for p in (*block.parameters(), x, residual))
    return launches.counts, before


def test_a_block_launches_few_kernels(counted):
    counts, _ = counted
    assert counts["_scan_forward_kernel"] == counts["_scan_backward_kernel"] == 1
    assert counts.total() <= MOST, counts


def test_parameters_are_packed_and_gradients_finished_in_one_kernel_each(counted):
    counts, before = counted
    assert before["_pack_kernel"] == counts["_finish_kernel"] == 1
    assert counts["_pack_kernel"] == 2  # again in the backward pass
    assert counts["aten::_to_copy"] <= 3  # of in_proj and its gradient, and that of out_proj


def test_nothing_is_filled_with_zeros_and_drop_path_is_inside_the_norm(counted):
    counts, _ = counted
    absent = ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "copy_", "cat", "stack", "mul")
    assert not [name for name in absent if counts[f"aten::{name}"]], counts
