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

from fambav.ops.dispatch import Backend, Table, expect


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
        ValueError: If a shape does not fit that of hidden.
    """
    expect("weight", weight, hidden.shape[-1:])
    if residual is not None:
        expect("residual", residual, hidden.shape)
    dtype = torch.promote_types(hidden.dtype, residual_dtype)
    total = hidden.to(dtype) if residual is None else residual.to(dtype) + hidden.to(dtype)
    run = RMS_NORM.pick(total, weight)
    normed: Tensor = run(total, weight, eps=eps, out_dtype=hidden.dtype)
    return normed, total


def _reference(x: Tensor, weight: Tensor, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * scale * weight.to(x.dtype)).to(out_dtype)


def _cpu(x: Tensor, weight: Tensor, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    y: Tensor = _Lean.apply(x, weight, eps, out_dtype)
    return y


class _Lean(torch.autograd.Function):
    """`_reference`, keeping its inputs and one number for each token."""

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


RMS_NORM = Table("rms_norm", Backend("cpu", _cpu), Backend("reference", _reference))
