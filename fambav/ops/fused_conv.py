"""Causal convolution by a set of compiled kernels, as one operator with a gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fambav.ops.dispatch import Backend
from fambav.ops.kernels import NUMBA, TRITON, KernelSet, kernel_set, on_gpu

MAX_WIDTH = 8

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, *, bool silu, bool reverse, str kernels"


def refuses(kernels: KernelSet, x: Tensor, weight: Tensor) -> str | None:
    """Say why these tensors cannot run here, or None."""
    if not x.numel():
        return "there are no tokens"
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        return f"width is {weight.shape[1]}, expected 1 to {MAX_WIDTH}"
    return kernels.refuses(x, weight)


def conv(
    kernels: KernelSet,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """Convolve as `causal_conv1d` says."""
    y: Tensor = _forward(x, weight, bias, silu=silu, reverse=reverse, kernels=kernels.name)
    return y


TRITON_CONV = Backend(
    "triton", partial(conv, TRITON), partial(refuses, TRITON), TRITON.missing, default=on_gpu
)
NUMBA_CONV = Backend("numba", partial(conv, NUMBA), partial(refuses, NUMBA), NUMBA.missing)


def _each(weight: Tensor, bias: Tensor | None) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return the parameters of the one direction."""
    return [weight], None if bias is None else [bias]


@custom_op("fambav::fused_conv", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, reverse: bool, kernels: str
) -> Tensor:
    run, y = kernel_set(kernels).load(), torch.empty_like(x)
    parameters = _each(weight, bias)
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
    """Return the gradients of the tensors that there are, in order."""
    run, dx = kernel_set(kernels).load(), torch.empty_like(x)
    given = grad.mT.unsqueeze(0), x.mT, *_each(weight, bias)
    dweight, dbias = run.conv_backward(*given, dx.mT, silu=silu, reverse=(reverse,))
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
