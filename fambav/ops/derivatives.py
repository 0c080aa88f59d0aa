"""Second derivatives of operations whose kernels have the first alone: refused, never zero.

`torch.autograd.function.once_differentiable` refuses only what `backward` reaches: under
`torch.autograd.grad`, which follows the paths to its inputs, such a second derivative is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fambav.ops.dispatch import COMPOSED_HINT, BackendError


def refuse(op: str) -> Callable[..., NoReturn]:
    """Return a gradient for the backward operator of `op`, which raises `BackendError`."""

    def gradient(ctx: Any, *grads: Any) -> NoReturn:
        del ctx, grads
        raise BackendError(
            f"{op} is differentiated twice, which its backend does not support; {COMPOSED_HINT}"
        )

    return gradient


def once_differentiable(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let the backward of an `autograd.Function` of `op` be differentiated by nothing.

    It takes the context, the saved tensors and the gradients.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> Any:
            saved = ctx.saved_tensors  # read once, as checkpointing requires
            with torch.no_grad():
                found = backward(ctx, saved, *grads)
            # `torch.compile` has no second derivatives of its own.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return found
            sources = [x for x in (*grads, *saved) if x is not None]
            return tuple(None if x is None else _Refused.apply(op, x, *sources) for x in found)

        return run

    return decorate


class _Refused(torch.autograd.Function):
    """A gradient that depends on its sources, but cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, op: str, x: Tensor, *sources: Tensor) -> Tensor:
        """Return x."""
        del sources
        ctx.op = op
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        """Refuse."""
        refuse(ctx.op)(ctx, *grads)
