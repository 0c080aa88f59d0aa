"""Addition to the residual stream and RMS normalisation in one step.

    residual <- residual + hidden
    normed = residual / sqrt(mean(residual^2) + eps) * weight

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fambav.arguments import is_number, refusal
from fambav.ops.derivatives import once_differentiable, refuse
from fambav.ops.dispatch import Backend, Table, expect_beside, expect_dtype, expect_tensors
from fambav.ops.kernels import TRITON, on_gpu

MAX_DIM = 16384  # of the Triton kernels, which hold a row in registers


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual_dtype: torch.dtype = torch.float32,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `hidden` to the residual stream and normalise the sum over its last axis.

    Args:
        hidden: Output of the last block, (..., dim), of any floating-point dtype.
        residual: Sum of the earlier outputs, shaped like hidden; None before the first block.
        weight: Scale, (dim,).
        eps: Added to the mean square, greater than 0.
        residual_dtype: Of the sum, at least; inputs of a wider dtype widen it.
        factor: Of each sample of hidden in the sum, (len(hidden),), without a gradient, such as
            that of stochastic depth; None for 1.

    Returns:
        normed, in hidden's dtype, and the new residual.  Both are shaped like hidden; the mean
        square is float32, or float64 if the sum is.

    Raises:
        ValueError: If a shape, dtype or device does not fit that of hidden, or an argument is not
            one of those above.
        BackendError: If a backend is forced that cannot run these tensors.

    Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.
    """
    expect_tensors(hidden=hidden)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected (..., dim >= 1)")
    expect_beside("hidden", hidden, hidden.shape, hidden)
    expect_beside("weight", weight, hidden.shape[-1:], hidden)
    if residual is not None:
        expect_beside("residual", residual, hidden.shape, hidden)
    if factor is not None:
        expect_beside("factor", factor, hidden.shape[:1], hidden)
    expect_dtype("residual_dtype", residual_dtype)
    if not is_number(eps) or not 0 < eps < math.inf:
        raise refusal("eps", eps, "a number greater than 0")
    run = ADD_RMS_NORM.pick(hidden, residual, weight)
    dtype = torch.promote_types(hidden.dtype, residual_dtype)
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    normed, total = run(hidden, residual, weight, factor, eps=eps, dtype=dtype)
    return normed, total


def _add(
    hidden: Tensor, residual: Tensor | None, factor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if factor is not None:
        hidden = hidden * factor.to(hidden.dtype).view(-1, *[1] * (hidden.dim() - 1))
    return hidden.to(dtype) if residual is None else residual.to(dtype) + hidden.to(dtype)


def _reference(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    factor: Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = _add(hidden, residual, factor, dtype)
    x = total.to(torch.promote_types(dtype, torch.float32))
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * scale * weight.to(x.dtype)).to(hidden.dtype), total


def _cpu(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    factor: Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = _add(hidden, residual, factor, dtype)
    normed: Tensor = _Norm.apply(total, weight, eps, hidden.dtype)
    return normed, total


class _Norm(torch.autograd.Function):
    """The norm of `_reference`, which keeps its inputs and one scale per token for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        """Normalise."""
        upcast = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = upcast.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (upcast * scale).mul_(weight).to(out_dtype)

    @staticmethod
    @once_differentiable("add_rms_norm")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> Any:
        """Return the gradients of x and weight."""
        del ctx
        x, weight, scale = saved
        normed, grad = x * scale, grad.to(scale.dtype)
        dweight = (grad * normed).flatten(0, -2).sum(0)
        dnormed = grad * weight
        along = (dnormed * normed).mean(dim=-1, keepdim=True)
        dx = dnormed.addcmul_(normed, along, value=-1).mul_(scale)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


def _unsupported(hidden: Tensor, residual: Tensor | None, weight: Tensor) -> str | None:
    """Return why the kernels cannot run these tensors, or None."""
    if hidden.shape[-1] > MAX_DIM:
        return f"dim is {hidden.shape[-1]}, expected at most {MAX_DIM}"
    tensors = (hidden, weight) if residual is None else (hidden, weight, residual)
    return next(filter(None, map(TRITON.unsupported, tensors)), None)


def _fused(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    factor: Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    factor = None if factor is None else factor.float().contiguous()
    normed, total, _ = _forward(hidden, residual, weight, factor, eps=eps, dtype=dtype)
    return normed, total


def _rows(x: Tensor) -> Tensor:
    """View as (rows, dim); copy if a row is not contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@custom_op(
    "fambav::add_rms_norm",
    mutates_args=(),
    schema="(Tensor hidden, Tensor? residual, Tensor weight, Tensor? factor, *, float eps,"
    " ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    factor: Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed, the new residual, and the scale of each row, (rows,)."""
    normed, total = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape, dtype=dtype)
    inputs = _rows(hidden), None if residual is None else _rows(residual), weight
    outputs = _rows(normed), _rows(total)
    scale: Tensor = TRITON.load().add_rms_norm_forward(*inputs, *outputs, eps=eps, factor=factor)
    return normed, total, scale


@_forward.register_fake
def _forward_shapes(hidden: Tensor, *_: Any, eps: float, dtype: torch.dtype) -> Any:
    del eps
    normed, total = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape, dtype=dtype)
    return normed, total, hidden.new_empty(math.prod(hidden.shape[:-1]), dtype=torch.float32)


@custom_op(
    "fambav::add_rms_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_total, Tensor total, Tensor weight, Tensor scale,"
    " Tensor? factor, *, ScalarType? dtype) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    factor: Tensor | None,
    *,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Return the gradients of weight, of hidden, and of a residual of `dtype` if there is one."""
    grads = [grad.new_empty(grad.shape)]
    if dtype is not None:
        grads.append(grad.new_empty(grad.shape, dtype=dtype))
    inputs = _rows(grad), None if grad_total is None else _rows(grad_total), _rows(total)
    outputs = [_rows(x) for x in grads]
    run = TRITON.load().add_rms_norm_backward
    dresidual = outputs[1] if dtype is not None else None
    dweight = run(*inputs, weight, scale, outputs[0], dresidual, factor=factor)
    return [dweight.to(weight.dtype), *grads]


@_backward.register_fake
def _backward_shapes(
    grad: Tensor, grad_total: Any, total: Any, weight: Tensor, *_: Any, dtype: Any
) -> list[Tensor]:
    del grad_total, total
    grads = [weight.new_empty(weight.shape), grad.new_empty(grad.shape)]
    return grads if dtype is None else [*grads, grad.new_empty(grad.shape, dtype=dtype)]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    hidden, residual, weight, factor = inputs
    normed, total, scale = output
    del hidden, keyword_only_inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, scale, factor)
    ctx.dtype = None if residual is None else residual.dtype
    ctx.normed_dtype = normed.dtype


def _gradient(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: Any) -> Any:
    saved = ctx.saved_tensors  # read once, as checkpointing requires
    if grad is None:
        grad = saved[0].new_zeros(saved[0].shape, dtype=ctx.normed_dtype)
    dweight, dhidden, *rest = _backward(grad, grad_total, *saved, dtype=ctx.dtype)
    return dhidden, rest[0] if rest else None, dweight, None


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(refuse("add_rms_norm"))


ADD_RMS_NORM = Table(
    "add_rms_norm",
    Backend(
        "triton",
        _fused,
        _unsupported,
        TRITON.unavailable,
        default=lambda hidden, residual, weight: on_gpu(hidden, weight),
    ),
    Backend("cpu", _cpu),
    Backend("reference", _reference),
)
