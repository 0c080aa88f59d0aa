"""Selective scan as a loop over the tokens: the reference, of PyTorch's own operations.

Source: Gu and Dao, "Mamba", arXiv:2312.00752, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.ops.dispatch import in_strides_of


def scan_loop(
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
    """Scan like `selective_scan`, with B and C of shape (batch, groups, state, length) or constant.

    Returns:
        y, (batch, dim, length), and the state after the last step, (batch, dim, state).
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, step, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if softplus:
        step = F.softplus(step)
    weights = [_each_step(w.to(dtype), dim=u.shape[1], length=u.shape[2]) for w in (B, C)]

    h = x.new_zeros(*x.shape[:2], A.shape[1])  # (batch, dim, state)
    y = []
    steps = list(zip(x.unbind(-1), step.unbind(-1), *weights, strict=True))
    for x_t, step_t, B_t, C_t in reversed(steps) if reverse else steps:
        h = torch.exp(step_t.unsqueeze(-1) * A) * h + (step_t * x_t).unsqueeze(-1) * B_t
        y.append((h * C_t).sum(dim=-1))  # (batch, dim)

    out = torch.stack(y[::-1] if reverse else y, dim=-1)  # (batch, dim, length)
    if D is not None:
        out = out + D.to(dtype)[:, None] * x
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return in_strides_of(u, out, out_dtype), h


def _each_step(weight: Tensor, *, dim: int, length: int) -> Sequence[Tensor]:
    """Split B or C into steps, each (batch, dim, state), where batch and dim may be 1."""
    if weight.dim() == 2:
        return [weight.unsqueeze(0)] * length
    if weight.shape[1] > 1:
        weight = weight.repeat_interleave(dim // weight.shape[1], dim=1)
    return weight.unbind(-1)
