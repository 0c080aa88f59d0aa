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

LEAST = 2**15  # elements of a weight: below, a call costs more than it saves at small batches


@functools.cache
def _onednn() -> Callable[..., Tensor] | None:
    """Return oneDNN's product as PyTorch calls it for compiled models, if it is faster; or None."""
    processor = getattr(torch.cpu, "get_capabilities", dict)()
    known = processor.get("cpu_name", "").startswith("AMD") and processor.get("avx512_f", False)
    if not (known and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    x = torch.arange(6.0).view(2, 3)
    try:
        run: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        agrees = torch.equal(run(x, x, None, "none", [], ""), F.linear(x, x))
    except (AttributeError, RuntimeError):  # it is not a public one
        return None
    return run if agrees else None


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T without a gradient, whose kernel is chosen by the weight alone.

    Args:
        x: (..., in).
        weight: (out, in), of the same dtype.

    Returns:
        (..., out).
    """
    plain = weight.device.type != "cpu" or weight.dtype != torch.float32
    if plain or weight.numel() < LEAST or not torch.backends.mkldnn.enabled or not x.numel():
        return F.linear(x, weight)
    run = _onednn()
    return F.linear(x, weight) if run is None else run(x, weight, None, "none", [], "")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T, differentiable as often as PyTorch's own.

    Args:
        x: As in `product`.
        weight: Likewise; autocast applies.

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
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _Linear.apply(x, weight)
        return out
    return product(x, weight)


class _Linear(torch.autograd.Function):
    """`product` with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return x @ weight.T."""
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and weight."""
        x, weight = ctx.saved_tensors
        run = F.linear if torch.is_grad_enabled() else product  # for a second derivative
        dx = run(grad, weight.mT) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        return dx, run(grad.flatten(0, -2).mT, x.flatten(0, -2).mT)
