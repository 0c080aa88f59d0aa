"""Selective scan, the recurrence inside Mamba.

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] h[t] + D u[t]

Source: Gu and Dao, "Mamba", arXiv:2312.00752, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.ops import selective_scan_cpu, selective_scan_cuda
from fambav.ops.dispatch import SCAN, Backend, Table, expect_beside
from fambav.ops.fused_scan import NUMBA_SCAN, TRITON_SCAN


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,  # noqa: FBT001  the signature is mamba-ssm's
    return_last_state: Literal[False] = ...,
    *,
    reverse: bool = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,  # noqa: FBT001  the signature is mamba-ssm's
    *,
    return_last_state: Literal[True],
    reverse: bool = ...,
    out_dtype: torch.dtype | None = ...,
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,  # noqa: FBT001, FBT002  the signature is mamba-ssm's
    return_last_state: bool = False,  # noqa: FBT001, FBT002  the signature is mamba-ssm's
    *,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan `u` along its last axis and gate the result.

    A drop-in for mamba-ssm's `selective_scan_fn`, with a direction.  Fastest on a CPU if the last
    axis is the slow one, as in the transpose of a (batch, length, dim) tensor, which is not copied.

    Args:
        u: Input, (batch, dim, length).
        delta: Step size before bias and softplus, shaped like u.
        A: Decay rate, (dim, state), real.
        B: Input weight, (batch, state, length), (batch, groups, state, length) where channel d
            belongs to group d // (dim / groups), or the same at all times, (dim, state).
        C: Output weight, with one of the shapes of B.
        D: Skip weight, (dim,).
        z: Gate, shaped like u; the result is multiplied by silu(z).
        delta_bias: Added to delta before softplus, (dim,).
        delta_softplus: Whether delta goes through softplus.
        return_last_state: Whether to return the state after the last step taken.
        reverse: Scan from the last token to the first.  The result keeps the order of u.
        out_dtype: Of the result; u's by default.

    Returns:
        y, shaped like u and, but for backend cuda, with u's strides; with `return_last_state` also
        h, (batch, dim, state).  The state is float32, or float64 if u is.

    Raises:
        ValueError: If a shape, dtype or device does not fit those of u and A.
        BackendError: If a backend is forced that cannot run these tensors.
    """
    B, C = (w.unsqueeze(1) if w.dim() == 3 else w for w in (B, C))
    _check(u, A, {"B": B, "C": C}, {"delta": delta, "z": z}, {"D": D, "delta_bias": delta_bias})
    run = SELECTIVE_SCAN.pick(u, A, B, C)
    y, last_state = run(
        *(u, delta, A, B, C, D, z, delta_bias),
        softplus=delta_softplus,
        reverse=reverse,
        out_dtype=out_dtype or u.dtype,
    )
    return (y, last_state) if return_last_state else y


def _check(
    u: Tensor,
    A: Tensor,
    weights: dict[str, Tensor],
    tokens: dict[str, Tensor | None],
    channels: dict[str, Tensor | None],
) -> None:
    if u.dim() != 3 or u.shape[2] < 1:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (batch, dim, length >= 1)")
    batch, dim, length = u.shape
    if A.dim() != 2 or A.is_complex():
        raise ValueError(f"A is {A.dtype} of {A.dim()} axes, expected real (dim, state)")
    state = A.shape[1]
    expect_beside("u", u, u.shape, u)
    expect_beside("A", A, (dim, state), u)
    for name, weight in weights.items():
        groups = weight.shape[1] if weight.dim() == 4 else 1
        if groups < 1 or dim % groups:
            raise ValueError(f"{name} has {groups} groups, expected a divisor of {dim} channels")
        constant = weight.dim() == 2
        shape = (dim, state) if constant else (batch, groups, state, length)
        expect_beside(name, weight, shape, u)
    for name, tensor in tokens.items():
        if tensor is not None:
            expect_beside(name, tensor, (batch, dim, length), u)
    for name, tensor in channels.items():
        if tensor is not None:
            expect_beside(name, tensor, (dim,), u)


def _reference(
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
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, step, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if softplus:
        step = F.softplus(step)
    weights = [_each_step(w.to(dtype), dim=u.shape[1], length=u.shape[2]) for w in (B, C)]

    h = x.new_zeros(*x.shape[:2], A.shape[1])
    y = []
    steps = list(zip(x.unbind(-1), step.unbind(-1), *weights, strict=True))
    for x_t, step_t, B_t, C_t in reversed(steps) if reverse else steps:
        h = torch.exp(step_t.unsqueeze(-1) * A) * h + (step_t * x_t).unsqueeze(-1) * B_t
        y.append((h * C_t).sum(dim=-1))

    out = torch.stack(y[::-1] if reverse else y, dim=-1)
    if D is not None:
        out = out + D.to(dtype)[:, None] * x
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return torch.empty_like(u, dtype=out_dtype).copy_(out), h


def _each_step(weight: Tensor, *, dim: int, length: int) -> Sequence[Tensor]:
    """Cut a weight into steps, (batch, dim, state), where batch and dim may be 1."""
    if weight.dim() == 2:
        return [weight.unsqueeze(0)] * length
    if weight.shape[1] > 1:
        weight = weight.repeat_interleave(dim // weight.shape[1], dim=1)
    return weight.unbind(-1)


SELECTIVE_SCAN = Table(
    SCAN,
    TRITON_SCAN,
    Backend(
        "cuda",
        selective_scan_cuda.scan,
        selective_scan_cuda.refuses,
        selective_scan_cuda.EXTENSION.missing,
    ),
    NUMBA_SCAN,
    Backend("cpu", selective_scan_cpu.scan, selective_scan_cpu.refuses),
    Backend("reference", _reference),
)
