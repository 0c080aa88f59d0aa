"""Selective scan, the recurrence inside Mamba.

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] h[t] + D u[t]

The Triton and numba backends are one operator, `fambav::fused_scan`.  It keeps the state before
each chunk of tokens for the backward pass, which recomputes the states in between.

Source: Gu and Dao, "Mamba", arXiv:2312.00752, algorithm 2 and, for the recomputation, section
3.3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from fambav.arguments import flags
from fambav.ops import scan_chunked, scan_mamba_ssm
from fambav.ops.derivatives import refuse
from fambav.ops.dispatch import (
    SCAN,
    Backend,
    Table,
    expect_beside,
    expect_dtype,
    expect_tensors,
    in_strides_of,
)
from fambav.ops.kernels import NUMBA, TRITON, KernelSet, kernel_set, on_gpu

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias,"
    " Tensor? skipped, Tensor? skipped_dt"
)
_OPTIONS = "*, bool softplus, bool reverse, str gap_policy, str kernels"


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

    A drop-in for mamba-ssm's `selective_scan_fn` of real numbers, with a direction.  Any strides
    are taken; on a CPU the transpose of a contiguous (batch, length, dim) tensor is fastest.

    Args:
        u: Input, (batch, dim, length), of any floating-point dtype; the batch may be empty.
        delta: Step size before bias and softplus, shaped like u.
        A: Decay rate, (dim, state), real.
        B: Input matrix: (batch, state, length); (batch, groups, state, length), where channel d
            belongs to group d // (dim / groups); or constant over time, (dim, state).
        C: Output matrix, in one of the shapes of B.
        D: Skip weight, (dim,).
        z: Gate, shaped like u; the result is multiplied by silu(z).
        delta_bias: Added to delta before softplus, (dim,).
        delta_softplus: Whether delta goes through softplus.
        return_last_state: Whether to return the state after the last step as well.
        reverse: Scan from the last token to the first.  The result keeps the order of u.
        out_dtype: Of the result, a floating-point one; u's by default.

    Returns:
        y, shaped like u and, except by backend cuda, with u's strides; with `return_last_state`
        also h, (batch, dim, state).  The state is float32, or float64 if u is.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or an argument is not as above.
        BackendError: If a backend is forced that cannot run these tensors.

    Source: Gu and Dao, "Mamba", arXiv:2312.00752, equations 2 and 4, with delta B for the
        discretized B, as in the authors' code.
    """
    expect_tensors(u=u, delta=delta, A=A, B=B, C=C)
    B, C = (w.unsqueeze(1) if w.dim() == 3 else w for w in (B, C))
    _check(u, A, {"B": B, "C": C}, {"delta": delta, "z": z}, {"D": D, "delta_bias": delta_bias})
    flags(delta_softplus=delta_softplus, return_last_state=return_last_state, reverse=reverse)
    out_dtype = u.dtype if out_dtype is None else out_dtype
    expect_dtype("out_dtype", out_dtype)
    run = SELECTIVE_SCAN.pick(u, A, B, C)
    y, last_state = run(
        *(u, delta, A, B, C, D, z, delta_bias),
        softplus=delta_softplus,
        reverse=reverse,
        out_dtype=out_dtype,
    )
    return (y, last_state) if return_last_state else y


def _check(
    u: Tensor,
    A: Tensor,
    weights: dict[str, Tensor],
    tokens: dict[str, Tensor | None],
    channels: dict[str, Tensor | None],
) -> None:
    if u.dim() != 3 or u.shape[1] < 1 or u.shape[2] < 1:
        shape = tuple(u.shape)
        raise ValueError(f"u has shape {shape}, expected (batch, dim >= 1, length >= 1)")
    batch, dim, length = u.shape
    if A.dim() != 2 or A.is_complex() or A.shape[1] < 1:
        given = f"{A.dtype} of shape {tuple(A.shape)}"
        raise ValueError(f"A is {given}, expected real (dim, state >= 1)")
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


def fused_unsupported(kernels: KernelSet, u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Return why the kernels cannot scan these tensors, or None."""
    if B.dim() != 4 or C.dim() != 4:
        return "B or C is constant over time, expected one for each token"
    if B.shape[1] != C.shape[1]:
        return f"B has {B.shape[1]} groups and C {C.shape[1]}, expected the same"
    return kernels.unsupported(u, A, B, C)


def fused_scan(
    kernels: KernelSet,
    *tensors: Tensor | None,
    skipped: Tensor | None = None,
    skipped_dt: Tensor | None = None,
    gap_policy: str = "none",
    return_dt: bool = False,
    softplus: bool,
    reverse: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan with one set of kernels.

    Args:
        kernels: The set.
        tensors: u, delta, A, B, C, D, z and delta_bias, as in `selective_scan`; B and C with their
            groups.
        skipped: Tokens removed in front of each, (batch, length), or None.
        skipped_dt: Their step sizes, summed, (batch, dim, length), or None.
        gap_policy: How the state ages over them.
        return_dt: Whether to return the step size after bias and softplus.
        softplus: Whether delta goes through softplus.
        reverse: Whether the scan goes from the last token to the first.
        out_dtype: Of the result.

    Returns:
        y, the last state, and the step size, (batch, dim, length), float32, or an empty tensor.
    """
    inputs = (*tensors, skipped, skipped_dt)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    options = dict(softplus=softplus, reverse=reverse, kernels=kernels.name)
    y, last_state, dt, _, _ = _forward(
        *inputs, **options, gap_policy=gap_policy, out_dtype=out_dtype, keep=keep,
        return_dt=return_dt,
    )  # fmt: skip
    return y, last_state, dt


def _plain(kernels: KernelSet, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return fused_scan(kernels, *tensors, **options)[:2]


def _by_token(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).unsqueeze(
        0
    )  # (batch, ..., length) -> (1 direction, batch, length, ...)


def _arguments(
    tensors: tuple[Any, ...], kernels: str
) -> tuple[list[Any], Tensor | None, dict[str, Any]]:
    """Return the kernels' arguments.

    Returns:
        u, delta, A, B, C, D, bias; z as (batch, length, dim); those about gaps by name.
    """
    u, delta, A, B, C, D, z, bias, skipped, skipped_dt = tensors
    cast = Tensor.float if kernels == NUMBA.name else Tensor.detach
    tokens = [_by_token(cast(x)) for x in (u, delta, B, C)]
    A = A.float().contiguous()
    D, bias = (None if x is None else [x.float().contiguous()] for x in (D, bias))
    arguments = [tokens[0], tokens[1], [A], tokens[2], tokens[3], D, bias]
    gap = dict(skipped=None if skipped is None else skipped[None])
    gap["skipped_dt"] = None if skipped_dt is None else _by_token(skipped_dt)
    return arguments, None if z is None else _by_token(cast(z))[0], gap


@custom_op(
    "fambav::fused_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, ScalarType out_dtype, bool keep, bool return_dt)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    *tensors: Any,
    softplus: bool,
    reverse: bool,
    gap_policy: str,
    kernels: str,
    out_dtype: torch.dtype,
    keep: bool,
    return_dt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, the step size, the states kept for backward, y before the gate.

    What is not wanted is empty.
    """
    run = kernel_set(kernels).load()
    arguments, z, gap = _arguments(tensors, kernels)
    out = torch.empty_like(tensors[0], dtype=out_dtype)
    y = out if z is None else torch.empty_like(out)
    dt = torch.empty_like(tensors[1], dtype=torch.float32) if return_dt else None
    last, kept = run.scan_forward(
        *arguments, _by_token(y), softplus=softplus, reverse=(reverse,), keep=keep, **gap,
        gap_policy=gap_policy, dt=None if dt is None else _by_token(dt),
    )  # fmt: skip
    if z is not None:
        run.gate_forward(_by_token(y), z, _by_token(out)[0], None, scale=1.0)
    before = y if keep and z is not None else y.new_empty(0)
    return out, last[0], kept.new_empty(0) if dt is None else dt, kept, before


@_forward.register_fake
def _forward_shapes(*tensors: Any, **options: Any) -> Any:
    u, delta, A, _, _, _, z, *_ = tensors
    (batch, dim, length), state = u.shape, A.shape[1]
    out = torch.empty_like(u, dtype=options["out_dtype"])
    keep, single = options["keep"], torch.float32
    shape = kernel_set(options["kernels"]).kept_shape(1, batch, length, dim, state)
    kept = u.new_empty(shape if keep else 0, dtype=single)
    before = torch.empty_like(out) if keep and z is not None else out.new_empty(0)
    dt = torch.empty_like(delta, dtype=single) if options["return_dt"] else kept.new_empty(0)
    return out, u.new_empty(batch, dim, state, dtype=single), dt, kept, before


@custom_op(
    "fambav::fused_scan_backward",
    mutates_args=(),
    schema=f"(Tensor? grad, Tensor? grad_state, Tensor kept, Tensor y, {_INPUTS}, Tensor? ddt,"
    f" {_OPTIONS}) -> Tensor[]",
)
def _backward(
    grad: Tensor | None,
    grad_state: Tensor | None,
    kept: Tensor,
    y: Tensor,
    *rest: Any,
    softplus: bool,
    reverse: bool,
    gap_policy: str,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of the inputs that have one and are not None, in order."""
    run, tensors, ddt = kernel_set(kernels).load(), rest[:-1], rest[-1]
    arguments, z, gap = _arguments(tensors, kernels)
    grads: list[Any] = [None if x is None else torch.empty_like(x) for x in _learned(tensors)]
    dy = _by_token(torch.zeros_like(tensors[0]) if grad is None else grad)
    if z is not None:
        dout, dz = dy, grads[6]
        dy = torch.empty_like(dout)
        run.gate_backward(dout[0], _by_token(y)[0], z, dy[0], _by_token(dz)[0], scale=1.0)
    outputs = [_by_token(x) for x in (grads[0], grads[1], grads[3], grads[4])]
    dlast = None if grad_state is None else grad_state.float().unsqueeze(0).contiguous()
    dA, dD, dbias = run.scan_backward(
        dy, dlast, kept, *arguments, *outputs, softplus=softplus, reverse=(reverse,), **gap,
        gap_policy=gap_policy, ddt=None if ddt is None else _by_token(ddt),
        dskipped_dt=None if grads[8] is None else _by_token(grads[8]),
    )  # fmt: skip
    for n, parameter_grad in ((2, dA), (5, dD), (7, dbias)):
        if grads[n] is not None:
            grads[n].copy_(parameter_grad[0])
    return [dx for dx in grads if dx is not None]


def _learned(tensors: Sequence[Any]) -> list[Any]:
    """Return the inputs without `skipped`, which has no gradient."""
    return [*tensors[:8], tensors[9]]


@_backward.register_fake
def _backward_shapes(grad: Any, grad_state: Any, kept: Any, y: Any, *rest: Any, **_: Any) -> Any:
    del grad, grad_state, kept, y
    return [torch.empty_like(x) for x in _learned(rest[:-1]) if x is not None]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[3:])
    names = ("softplus", "reverse", "gap_policy", "kernels")
    ctx.options = {name: keyword_only_inputs[name] for name in names}


def _gradient(ctx: Any, grad: Any, grad_state: Any, ddt: Any, *_: Any) -> Any:
    *inputs, kept, y = ctx.saved_tensors
    grads = iter(_backward(grad, grad_state, kept, y, *inputs, ddt, **ctx.options))
    *first, last = (None if x is None else next(grads) for x in _learned(inputs))
    return *first, None, last


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(refuse(SCAN))


SELECTIVE_SCAN = Table(
    SCAN,
    Backend(
        "triton",
        partial(_plain, TRITON),
        partial(fused_unsupported, TRITON),
        TRITON.unavailable,
        default=on_gpu,
    ),
    Backend(
        "cuda",
        scan_mamba_ssm.scan,
        scan_mamba_ssm.unsupported,
        scan_mamba_ssm.EXTENSION.unavailable,
    ),
    Backend("numba", partial(_plain, NUMBA), partial(fused_unsupported, NUMBA), NUMBA.unavailable),
    Backend("cpu", scan_chunked.scan, scan_chunked.unsupported),
    Backend("reference", _reference),
)
