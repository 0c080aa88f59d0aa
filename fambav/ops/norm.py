"""Addition to the residual stream and RMS normalisation in one step.

    residual <- residual + hidden
    normed = residual / sqrt(mean(residual^2) + eps) * weight

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fambav.ops.dispatch import Backend, Table, expect_beside
from fambav.ops.fused_norm import TRITON_NORM


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Add `hidden` to the residual stream and normalise the sum over its last axis.

    Args:
        hidden: Output of the last block, (..., dim).
        residual: Sum of the outputs before, shaped like hidden; None before the first block.
        weight: Scale, (dim,).
        eps: Added to the mean square, greater than 0.
        residual_dtype: Least precise type of the sum; wider inputs widen it.

    Returns:
        normed, in hidden's dtype, and the new residual.  Both are shaped like hidden.

    Raises:
        ValueError: If a shape, dtype or device does not fit that of hidden.
    """
    expect_beside("hidden", hidden, hidden.shape, hidden)
    expect_beside("weight", weight, hidden.shape[-1:], hidden)
    if residual is not None:
        expect_beside("residual", residual, hidden.shape, hidden)
    run = ADD_RMS_NORM.pick(hidden, residual, weight)
    dtype = torch.promote_types(hidden.dtype, residual_dtype)
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    normed, total = run(hidden, residual, weight, eps=eps, dtype=dtype)
    return normed, total


def _add(hidden: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    return hidden.to(dtype) if residual is None else residual.to(dtype) + hidden.to(dtype)


def _reference(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = _add(hidden, residual, dtype)
    x = total.to(torch.promote_types(dtype, torch.float32))
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * scale * weight.to(x.dtype)).to(hidden.dtype), total


def _cpu(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = _add(hidden, residual, dtype)
    normed: Tensor = _Norm.apply(total, weight, eps, hidden.dtype)
    return normed, total


class _Norm(torch.autograd.Function):
    """The norm of `_reference`, keeping its inputs and one number for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        """Normalise."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        normed, grad = x * scale, grad.to(scale.dtype)
        dweight = (grad * normed).flatten(0, -2).sum(0)
        dnormed = grad * weight
        along = (dnormed * normed).mean(dim=-1, keepdim=True)
        dx = dnormed.addcmul_(normed, along, value=-1).mul_(scale)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


ADD_RMS_NORM = Table(
    "add_rms_norm", TRITON_NORM, Backend("cpu", _cpu), Backend("reference", _reference)
)
