"""Selective scan by mamba-ssm's CUDA extension, if it is installed.

The extension is called directly: importing the package around it needs more dependencies than the
kernel does.  It has no reverse direction, which costs flips; its gradients of B and C are not
deterministic; and the last state has no gradient.

Source: https://github.com/state-spaces/mamba, `selective_scan_interface.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fambav.ops.derivatives import once_differentiable
from fambav.ops.dispatch import SCAN, BackendError
from fambav.ops.kernels import Extension, off_gpu, unsupported_dtype

EXTENSION = Extension("selective_scan_cuda", "fwd", "bwd", package="mamba-ssm")
MAX_STATE = 256


def unsupported(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Return why the extension cannot scan these tensors, or None."""
    if A.shape[1] > MAX_STATE:
        return f"state is {A.shape[1]}, expected at most {MAX_STATE}"
    return off_gpu(u, A, B, C) or unsupported_dtype(u.dtype)


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
    """Scan like `selective_scan`, with B and C of shape (batch, groups, state, length).

    Returns:
        y, (batch, dim, length), and the state after the last step, (batch, dim, state).
    """

    def tokens(x: Tensor | None) -> Any:
        if x is None:
            return None
        return _last_contiguous(x.to(u.dtype).flip(-1) if reverse else x.to(u.dtype))

    def weight(x: Tensor) -> Any:
        return x.float() if x.dim() == 2 else tokens(x)

    def channels(x: Tensor | None) -> Any:
        return None if x is None else x.float().contiguous()  # the kernel ignores its stride

    y, last_state = _Scan.apply(
        *(tokens(u), tokens(delta), A.float(), weight(B), weight(C)),
        *(channels(D), tokens(z), channels(delta_bias), softplus),
    )
    return (y.flip(-1) if reverse else y).to(out_dtype), last_state


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Scan(torch.autograd.Function):
    """The extension's `fwd` and `bwd`."""

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
    @once_differentiable(SCAN)
    def backward(ctx: Any, saved: Any, grad: Tensor | None, grad_state: Tensor | None) -> Any:
        """Return the gradients of the tensors."""
        if grad_state is not None:
            raise BackendError("the last state has a gradient, expected none with backend 'cuda'")
        *tensors, states, out = saved
        if grad is None:
            return (None,) * (len(tensors) + 1)
        options = None, ctx.softplus, False  # no buffer for dz; the gated output is not recomputed
        grads = EXTENSION.call("bwd", *tensors, _last_contiguous(grad), states, out, *options)
        du, ddelta, dA, dB, dC, dD, dbias, *dz = grads
        ordered = du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, dbias
        pairs = zip(ordered, tensors, strict=True)
        return (*(None if x is None else dx for dx, x in pairs), None)
