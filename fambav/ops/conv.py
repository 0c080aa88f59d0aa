"""Causal depthwise convolution along the tokens.

Each channel has its own kernel, and no token sees a later one:

    y[t] = activation(bias + sum over k of weight[k] x[t - width + 1 + k])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fambav.ops.dispatch import Backend, Table, expect_beside, without_autocast
from fambav.ops.extensions import Extension, off_gpu, unsuited
from fambav.ops.fused_conv import NUMBA_CONV, TRITON_CONV

ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """Convolve each channel with its own kernel over the tokens before.

    A drop-in for causal-conv1d's `causal_conv1d_fn` without its state arguments, with a direction.

    Args:
        x: Input, (batch, dim, length).
        weight: Kernels, (dim, width); the last tap meets the present token.
        bias: Added to the result, (dim,).
        activation: None, "silu" or "swish", which are the same function.
        reverse: See the tokens after instead: flip, convolve, flip.

    Returns:
        y, with x's shape and dtype and, but for backend cuda, its strides; sums are float32, or
        float64 if x is.

    Raises:
        ValueError: If a shape, dtype or device does not fit that of x, or the activation is
            unknown.
        BackendError: If a backend is forced that cannot run these tensors.
    """
    if x.dim() != 3 or x.shape[2] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, dim, length >= 1)")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (dim, width)")
    expect_beside("x", x, x.shape, x)
    expect_beside("weight", weight, (x.shape[1], weight.shape[1]), x)
    if bias is not None:
        expect_beside("bias", bias, (x.shape[1],), x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {ACTIVATIONS}")
    run = CAUSAL_CONV1D.pick(x, weight)
    with without_autocast(x):
        y: Tensor = run(x, weight, bias, silu=activation is not None, reverse=reverse)
    return y


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, reverse: bool
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel = (weight.flip(1) if reverse else weight).to(dtype).unsqueeze(1)
    reach = weight.shape[1] - 1
    padded = F.pad(x.to(dtype), (0, reach) if reverse else (reach, 0))
    y = F.conv1d(padded, kernel, None if bias is None else bias.to(dtype), groups=x.shape[1])
    return torch.empty_like(x).copy_(F.silu(y) if silu else y)


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, reverse: bool) -> Tensor:
    if torch.compiler.is_compiling():  # it decides itself what to keep
        return torch.empty_like(x).copy_(_as_image(x, weight, bias, silu=silu, reverse=reverse))
    y: Tensor = _Recomputed.apply(x, weight, bias, silu, reverse)
    return y


def _as_image(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, reverse: bool
) -> Tensor:
    """Convolve as an image one pixel high, whose kernels are the fast ones for channels last."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel = (weight.flip(1) if reverse else weight).to(dtype)[:, None, None]
    reach = weight.shape[1] - 1
    padded = F.pad(x.to(dtype).unsqueeze(2), (0, reach) if reverse else (reach, 0))
    y = F.conv2d(padded, kernel, None if bias is None else bias.to(dtype), groups=x.shape[1])
    return F.silu(y.squeeze(2), inplace=not y.requires_grad) if silu else y.squeeze(2)


class _Recomputed(torch.autograd.Function):
    """`_as_image`, keeping nothing but its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        """Return y in x's dtype and strides."""
        weight, bias, ctx.silu, ctx.reverse = rest
        ctx.save_for_backward(x, weight, bias)
        y = _as_image(x, weight, bias, silu=ctx.silu, reverse=ctx.reverse)
        out = torch.empty_like(x)
        return y if (y.dtype, y.stride()) == (x.dtype, out.stride()) else out.copy_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of x, weight and bias."""
        inputs: list[Any] = [
            None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors
        ]
        with torch.enable_grad(), without_autocast(grad):
            y = _as_image(*inputs, silu=ctx.silu, reverse=ctx.reverse)
            grads = torch.autograd.grad(y, [t for t in inputs if t is not None], grad.to(y.dtype))
        return *grads, *(None for _ in range(5 - len(grads)))


EXTENSION = Extension("causal_conv1d", "causal_conv1d_fn", package="causal-conv1d")


def _cuda_refuses(x: Tensor, weight: Tensor) -> str | None:
    if not 2 <= weight.shape[1] <= 4:
        return f"width is {weight.shape[1]}, expected 2, 3 or 4"
    return off_gpu(x, weight) or unsuited(x.dtype)


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, reverse: bool) -> Tensor:
    x = x.flip(2) if reverse else x
    last = x.stride(1) == 1 and not any(n % 8 for n in (x.shape[1], x.stride(0), x.stride(2)))
    x = x if last else x.contiguous()  # the kernel reads channels last only in eights
    activation = "silu" if silu else None
    y: Tensor = EXTENSION.call("causal_conv1d_fn", x, weight, bias, activation=activation)
    return y.flip(2) if reverse else y


CAUSAL_CONV1D = Table(
    "causal_conv1d",
    TRITON_CONV,
    Backend("cuda", _cuda, _cuda_refuses, EXTENSION.missing),
    NUMBA_CONV,
    Backend("cpu", _cpu),
    Backend("reference", _reference),
)
