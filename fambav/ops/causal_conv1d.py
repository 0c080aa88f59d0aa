"""Causal depthwise convolution along the tokens.

    y[t] = activation(bias + sum over k of weight[k] x[t - width + 1 + k])

Source: Gu and Dao, "Mamba", arXiv:2312.00752, figure 3; the interface is that of
https://github.com/Dao-AILab/causal-conv1d.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from fambav.arguments import flag, refusal
from fambav.ops.dispatch import Backend, Table, expect_beside, expect_tensors, without_autocast
from fambav.ops.kernels import (
    NUMBA,
    TRITON,
    Extension,
    KernelSet,
    kernel_set,
    off_gpu,
    on_gpu,
    unsupported_dtype,
)

ACTIVATIONS = (None, "silu", "swish")
MAX_WIDTH = 8  # of our kernels

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, *, bool silu, bool reverse, str kernels"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """Convolve each channel with its own kernel over the present and preceding tokens.

    A drop-in for causal-conv1d's `causal_conv1d_fn` without its state arguments, with a direction.

    Args:
        x: Input, (batch, dim, length), of any floating-point dtype; the batch may be empty.
        weight: Kernels, (dim, width); the last tap multiplies the present token.
        bias: Added to the result, (dim,).
        activation: None, "silu" or "swish", which are the same function.
        reverse: Convolve over the following tokens instead: flip, convolve, flip.

    Returns:
        y, with x's shape and dtype and, except by backend cuda, its strides; accumulated in
        float32, or float64 if x is.

    Raises:
        ValueError: If a shape, dtype or device does not fit that of x, or an argument is not one of
            those above.
        BackendError: If a backend is forced that cannot run these tensors.
    """
    expect_tensors(x=x, weight=weight)
    if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] < 1:
        shape = tuple(x.shape)
        raise ValueError(f"x has shape {shape}, expected (batch, dim >= 1, length >= 1)")
    if weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (dim, width >= 1)")
    expect_beside("x", x, x.shape, x)
    expect_beside("weight", weight, (x.shape[1], weight.shape[1]), x)
    if bias is not None:
        expect_beside("bias", bias, (x.shape[1],), x)
    if activation not in ACTIVATIONS:
        raise refusal("activation", activation, f"one of {ACTIVATIONS}")
    flag("reverse", reverse)
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
    if torch.compiler.is_compiling():  # the compiler decides what is kept
        return torch.empty_like(x).copy_(_as_image(x, weight, bias, silu=silu, reverse=reverse))
    y: Tensor = _Recomputed.apply(x, weight, bias, silu, reverse)
    return y


def _as_image(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, reverse: bool
) -> Tensor:
    """Convolve as an image one pixel high: conv2d is fast for channels last."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel = (weight.flip(1) if reverse else weight).to(dtype)[:, None, None]
    reach = weight.shape[1] - 1
    padded = F.pad(x.to(dtype).unsqueeze(2), (0, reach) if reverse else (reach, 0))
    # `padded` is an image: batch, dim, height 1, width reach + length.
    y = F.conv2d(padded, kernel, None if bias is None else bias.to(dtype), groups=x.shape[1])
    return F.silu(y.squeeze(2), inplace=not y.requires_grad) if silu else y.squeeze(2)


class _Recomputed(torch.autograd.Function):
    """`_as_image`, recomputed in the backward pass."""

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


def _cuda_unsupported(x: Tensor, weight: Tensor) -> str | None:
    if not 2 <= weight.shape[1] <= 4:
        return f"width is {weight.shape[1]}, expected 2, 3 or 4"
    return off_gpu(x, weight) or unsupported_dtype(x.dtype)


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, reverse: bool) -> Tensor:
    x = x.flip(2) if reverse else x
    last = x.stride(1) == 1 and not any(n % 8 for n in (x.shape[1], x.stride(0), x.stride(2)))
    x = x if last else x.contiguous()  # channels last, the kernel needs multiples of 8
    activation = "silu" if silu else None
    y: Tensor = EXTENSION.call("causal_conv1d_fn", x, weight, bias, activation=activation)
    return y.flip(2) if reverse else y


def _unsupported(kernels: KernelSet, x: Tensor, weight: Tensor) -> str | None:
    """Return why our kernels cannot convolve these tensors, or None."""
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        return f"width is {weight.shape[1]}, expected 1 to {MAX_WIDTH}"
    return kernels.unsupported(x, weight)


def _fused(
    kernels: KernelSet,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> Tensor:
    y: Tensor = _forward(x, weight, bias, silu=silu, reverse=reverse, kernels=kernels.name)
    return y


def _one_direction(weight: Tensor, bias: Tensor | None) -> tuple[list[Tensor], list[Tensor] | None]:
    return [weight], None if bias is None else [bias]


@custom_op("fambav::fused_conv", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, reverse: bool, kernels: str
) -> Tensor:
    run, y = kernel_set(kernels).load(), torch.empty_like(x)
    parameters = _one_direction(weight, bias)
    # (batch, length, dim) in, (1 direction, batch, length, dim) out
    run.conv_forward(x.mT, *parameters, y.mT.unsqueeze(0), silu=silu, reverse=(reverse,))
    return y


@_forward.register_fake
def _forward_shapes(x: Tensor, *_: Any, **options: Any) -> Tensor:
    del options
    return torch.empty_like(x)


@custom_op(
    "fambav::fused_conv_backward", mutates_args=(), schema=f"(Tensor grad, {_INPUTS}) -> Tensor[]"
)
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    silu: bool,
    reverse: bool,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of x, weight and, if there is one, bias."""
    run, dx = kernel_set(kernels).load(), torch.empty_like(x)
    inputs = grad.mT.unsqueeze(0), x.mT, *_one_direction(weight, bias)
    dweight, dbias = run.conv_backward(*inputs, dx.mT, silu=silu, reverse=(reverse,))
    grads = [dx, torch.empty_like(weight).copy_(dweight[0])]
    return grads if bias is None else [*grads, torch.empty_like(bias).copy_(dbias[0])]


@_backward.register_fake
def _backward_shapes(grad: Tensor, *tensors: Tensor | None, **options: Any) -> list[Tensor]:
    del grad, options
    return [torch.empty_like(x) for x in tensors if x is not None]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    del output
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _gradient(ctx: Any, grad: Tensor) -> Any:
    inputs = ctx.saved_tensors
    grads = iter(_backward(grad, *inputs, **ctx.options))
    return tuple(None if x is None else next(grads) for x in inputs)


_forward.register_autograd(_gradient, setup_context=_setup)


CAUSAL_CONV1D = Table(
    "causal_conv1d",
    Backend(
        "triton",
        partial(_fused, TRITON),
        partial(_unsupported, TRITON),
        TRITON.unavailable,
        default=on_gpu,
    ),
    Backend("cuda", _cuda, _cuda_unsupported, EXTENSION.unavailable),
    Backend("numba", partial(_fused, NUMBA), partial(_unsupported, NUMBA), NUMBA.unavailable),
    Backend("cpu", _cpu),
    Backend("reference", _reference),
)
