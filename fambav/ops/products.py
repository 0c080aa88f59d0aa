"""Matrix products by oneDNN, where PyTorch's own leave half of the processor unused.

PyTorch computes float32 products by MKL, whose kernels for processors of AMD are those for AVX2; in
AVX-512, oneDNN's do twice as much per cycle where the processor can, and never less.  On other
processors, for small weights and under everything that traces or transforms, PyTorch's own run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.ops import dispatch

_ARGUMENTS = ["X", "W", "B", "attr", "scalars", "algorithm"]  # that we know what to give for
LEAST, LEAST_TOKENS = 2**12, 64  # weights and tokens: below, a call costs more than it saves


@functools.cache
def _onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return oneDNN's product as PyTorch calls it for compiled models, if it is faster; or None."""
    processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = processor.get("cpu_name", "").startswith("AMD") and processor.get("avx512_f", False)
    if not (known and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # it is not a public one
    run: Any = getattr(packet, "default", None)
    if run is None or [argument.name for argument in run._schema.arguments] != _ARGUMENTS:
        return None
    return lambda x, weight: run(x, weight, None, "none", [], "")


def choose(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what multiplies x and weight, and their gradients; a batch of any size has the same.

    Args:
        x: (..., tokens, in).
        weight: (out, in), of the same dtype.

    Returns:
        A function like `F.linear`; it may be without a gradient.
    """
    if (
        (weight.device.type, weight.dtype) != ("cpu", torch.float32)
        or weight.numel() < LEAST
        or x.shape[-2] < LEAST_TOKENS
        or not torch.backends.mkldnn.enabled
        or not x.numel()
    ):
        return F.linear
    return _onednn() or F.linear


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T, differentiable as often as PyTorch's own.

    Args:
        x: As in `choose`.
        weight: Likewise, but of any dtype; autocast applies.

    Returns:
        (..., out).
    """
    if (
        torch.compiler.is_compiling()
        or type(weight) not in (Tensor, torch.nn.Parameter)
        or type(x) is not Tensor
        or x.dtype != weight.dtype
        or dispatch.autocasts(x)
        or dispatch.plain_autograd()
    ):
        return F.linear(x, weight)
    multiply = choose(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = F.linear(x, weight) if multiply is F.linear else _Linear.apply(x, weight)
        return out
    return multiply(x, weight)


class _Linear(torch.autograd.Function):
    """The product of `choose`, with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return x @ weight.T."""
        ctx.save_for_backward(x, weight)
        return choose(x, weight)(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and weight."""
        x, weight = ctx.saved_tensors
        multiply = F.linear if torch.is_grad_enabled() else choose(x, weight)  # may be taken twice
        dx = multiply(grad, weight.mT) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        return dx, multiply(grad.flatten(0, -2).mT, x.flatten(0, -2).mT)
