"""Selective scan by mamba-ssm's compiled extension, if it is installed.

The extension is called directly: importing the package around it needs more packages than the
kernel does.  It has no reverse direction, so that costs flips; its gradients of B and C are summed
in no fixed order; and the last state has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fambav.ops.dispatch import BackendError
from fambav.ops.extensions import Extension, off_gpu, unsuited

EXTENSION = Extension("selective_scan_cuda", "fwd", "bwd", package="mamba-ssm")
MAX_STATE = 256


def refuses(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Say why these tensors cannot run here, or None."""
    if A.shape[1] > MAX_STATE:
        return f"state is {A.shape[1]}, expected at most {MAX_STATE}"
    return off_gpu(u, A, B, C) or unsuited(u.dtype)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    softplus: bool,
    reverse: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scan as `selective_scan` says, with B and C of shape (batch, groups, state, length).

    Returns:
        y, (batch, dim, length), and the state after the last step, (batch, dim, state).
    """

    def along(x: Tensor | None) -> Any:
        return None if x is None else _rows(x.to(u.dtype).flip(-1) if reverse else x.to(u.dtype))

    def weight(x: Tensor) -> Any:
        return x.float() if x.dim() == 2 else along(x)

    def each(x: Tensor | None) -> Any:
        return None if x is None else x.float().contiguous()  # the kernel reads no stride of it

    y, last_state = _Scan.apply(
        *(along(u), along(delta), A.float(), weight(B), weight(C)),
        *(each(D), along(z), each(delta_bias), softplus),
    )
    return (y.flip(-1) if reverse else y).to(out_dtype), last_state


def _rows(x: Tensor) -> Tensor:
    """Make the last axis contiguous, as the kernel wants it."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Scan(torch.autograd.Function):
    """The extension's two functions."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Return y and the last state."""
        *tensors, ctx.softplus = arguments
        out, states, *gated = EXTENSION.call("fwd", *arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, states, out if gated else None)
        last_state = states[:, :, -1, 1::2].clone()  # pairs of decay and state at each chunk's end
        return (gated[0] if gated else out), last_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_state: Tensor | None) -> Any:
        """Return the gradients of the tensors."""
        if grad_state is not None:
            raise BackendError("the last state has a gradient, expected none with backend 'cuda'")
        *tensors, states, out = ctx.saved_tensors
        if grad is None:
            return (None,) * (len(tensors) + 1)
        options = None, ctx.softplus, False  # dz goes nowhere yet; the gated output is not wanted
        grads = EXTENSION.call("bwd", *tensors, _rows(grad), states, out, *options)
        du, ddelta, dA, dB, dC, dD, dbias, *dz = grads
        found = du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, dbias
        pairs = zip(found, tensors, strict=True)
        return (*(None if x is None else dx for dx, x in pairs), None)
