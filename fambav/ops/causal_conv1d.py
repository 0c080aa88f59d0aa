"""Causal depthwise convolution along the tokens.

    y[t] = activation(bias + sum over k of weight[k] x[t - width + 1 + k])

Source: Gu and Dao, "Mamba", arXiv:2312.00752, figure 3; the interface is that of
https://github.com/Dao-AILab/causal-conv1d.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from fambav.arguments import flags, refusal
from fambav.ops.derivatives import once_differentiable, refuse
from fambav.ops.dispatch import (
    Backend,
    Table,
    expect_beside,
    expect_tensors,
    in_strides_of,
    without_autocast,
)
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


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    activation: str | None = ...,
    *,
    seq_idx: None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[False] = ...,
    final_states_out: None = ...,
    reverse: bool = ...,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    activation: str | None = ...,
    *,
    seq_idx: None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[True],
    final_states_out: Tensor | None = ...,
    reverse: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own kernel over the present and preceding tokens.

    A drop-in for causal-conv1d's `causal_conv1d_fn`, with a direction, where what follows the bias
    is given by keyword and no `seq_idx` is.

    Args:
        x: Input, (batch, dim, length), of any floating-point dtype; the batch may be empty.
        weight: Kernels, (dim, width); the last tap multiplies the present token.
        bias: Added to the result, (dim,).
        activation: None, "silu" or "swish", which are the same function.
        seq_idx: Packed sequences are not supported: None.
        initial_states: The tokens before the first, (batch, dim, width - 1); None for zeros.
        return_final_states: Whether to return the last width - 1 tokens as well, which are the
            initial states of what follows.
        final_states_out: Where to write them, (batch, dim, width - 1); None for a new tensor.
        reverse: Convolve over the following tokens instead: flip, convolve, flip.  Initial states
            come after the last token, and final ones are the first tokens, all in the order of x.

    Returns:
        y, with x's shape and dtype and, except by backend cuda or with initial states, its strides;
        accumulated in float32, or float64 if x is.  With `return_final_states` also those,
        (batch, dim, width - 1), in x's dtype.

    Raises:
        ValueError: If a shape, dtype or device does not fit that of x, an argument is not one of
            those above, there is a seq_idx, or a place for final states that are not returned.
        BackendError: If a backend is forced that cannot run these tensors.
    """
    _check(x, weight, bias, activation)
    flags(return_final_states=return_final_states, reverse=reverse)
    if seq_idx is not None:
        raise ValueError("seq_idx is given, expected None; convolve packed sequences one by one")
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out is given, expected None without return_final_states")
    whole, reach = x, weight.shape[1] - 1
    _check_states(x, reach, initial_states=initial_states, final_states_out=final_states_out)
    if initial_states is not None:
        parts = initial_states.to(x.dtype), x
        whole = torch.cat(parts[::-1] if reverse else parts, dim=2)  # (batch, dim, reach + length)
    run = CAUSAL_CONV1D.pick(whole, weight)
    with without_autocast(x):
        y: Tensor = run(whole, weight, bias, silu=activation is not None, reverse=reverse)
    if initial_states is not None:
        y = y.narrow(2, 0 if reverse else reach, x.shape[2])
    if not return_final_states:
        return y
    final = _final_states(whole, reach, reverse=reverse)
    return y, final if final_states_out is None else final_states_out.copy_(final)


def _check_states(x: Tensor, reach: int, **states: Tensor | None) -> None:
    for name, tensor in states.items():
        if tensor is not None:
            expect_beside(name, tensor, (*x.shape[:2], reach), x)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: object) -> None:
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
    if isinstance(activation, Tensor) or activation not in ACTIVATIONS:
        raise refusal("activation", activation, f"one of {ACTIVATIONS}")


def _final_states(x: Tensor, reach: int, *, reverse: bool) -> Tensor:
    """Return the last `reach` tokens, or the first in reverse, with zeros for those before x."""
    missing = reach - x.shape[2]  # negative where F.pad has to cut
    return F.pad(x, (0, missing) if reverse else (missing, 0))


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, reverse: bool
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel = (weight.flip(1) if reverse else weight).to(dtype).unsqueeze(1)
    reach = weight.shape[1] - 1
    padded = F.pad(x.to(dtype), (0, reach) if reverse else (reach, 0))
    y = F.conv1d(padded, kernel, None if bias is None else bias.to(dtype), groups=x.shape[1])
    return in_strides_of(x, F.silu(y) if silu else y, x.dtype)


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
    @once_differentiable("causal_conv1d")
    def backward(ctx: Any, saved: Any, grad: Tensor) -> Any:
        """Return the gradients of x, weight and bias."""
        inputs: list[Any] = [None if t is None else t.detach().requires_grad_() for t in saved]
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
_backward.register_autograd(refuse("causal_conv1d"))


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
