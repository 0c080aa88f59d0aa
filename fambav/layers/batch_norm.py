"""Batch normalisation over the samples of all processes, as one process would compute it.

Sums are reduced in the forward pass, and their gradients in the backward pass, on every backend of
torch.distributed; torch's own SyncBatchNorm needs a GPU.

Source: Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Normalise by mean and variance over all processes while training.

    Arguments are those of `nn.BatchNorm2d`, whose weights load.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of x, (batch, channels, height, width)."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        out: Tensor = self._shared(x)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _shared(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_full((1,), x.numel() // x.shape[1])
        sums = over_processes(torch.cat([wide.sum(dim=(0, 2, 3)), count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count  # (channels,)
        wide = wide - mean[:, None, None]
        squares = over_processes(wide.square().sum(dim=(0, 2, 3)))
        variance = squares / count
        self._follow(mean.detach(), squares.detach() / (count - 1))
        out = wide * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, if there are any, towards those of this batch."""
        if self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # there with the others
        share = self.momentum
        if share is None:  # all batches count alike
            share = 1 / self.num_batches_tracked.item()  # type: ignore[union-attr]
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


def over_processes(x: Tensor) -> Tensor:
    """Sum a tensor over the processes of a job, if there are several.

    The gradient is summed too, since each process has a loss of its own.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    out: Tensor = _Sum.apply(x)
    return out


def share_batch_norms(model: nn.Module) -> None:
    """Replace the batch norms inside a model by `SharedBatchNorm2d` of the same parameters."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, _shared(child))


def _shared(norm: nn.BatchNorm2d) -> SharedBatchNorm2d:
    how = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made = SharedBatchNorm2d(*how)
    for name, value in (*norm.named_parameters(), *norm.named_buffers()):
        setattr(made, name, value)
    return made.train(norm.training)


class _Sum(torch.autograd.Function):
    """Sum over the processes, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        del ctx
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
