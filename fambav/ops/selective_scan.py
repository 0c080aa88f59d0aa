"""Selective scan, the recurrence inside Mamba.

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] h[t] + D u[t]

The Triton and numba backends are one operator, `fambav::fused_scan`.  It keeps the state before
each chunk of tokens for the backward pass, which recomputes the states in between.

Along an order table each group of channels walks the tokens in its own order.  numba's kernels read
and write them there; elsewhere tokens are gathered for a plain scan, and its results put back.

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
)
from fambav.ops.kernels import NUMBA, TRITON, KernelSet, kernel_set, on_gpu
from fambav.ops.scan_loop import scan_loop
from fambav.ops.scan_order import expect_order, to_steps, to_tokens

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias,"
    " Tensor? skipped, Tensor? skipped_dt, Tensor? order"
)
_OPTIONS = "*, bool softplus, bool reverse, str gap_policy, bool order_params, str kernels"


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
    order: Tensor | None = ...,
    order_params: bool = ...,
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
    order: Tensor | None = ...,
    order_params: bool = ...,
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
    order: Tensor | None = None,
    order_params: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan `u` along its last axis and gate the result.

    A drop-in for mamba-ssm's `selective_scan_fn` of real numbers, with directions.  Any strides
    are taken; on a CPU the transpose of a contiguous (batch, length, dim) tensor is fastest.

    Args:
        u: Input, (batch, dim, length), of any floating-point dtype; the batch may be empty.  With
            an order also (batch, dim / groups, length), channels that every group walks.
        delta: Step size before bias and softplus, shaped like u; with an order of either shape.
        A: Decay rate, (dim, state), real.
        B: Input matrix: (batch, state, length); (batch, groups, state, length), where channel d
            belongs to group d // (dim / groups); or constant over time, (dim, state).
        C: Output matrix, in one of the shapes of B.
        D: Skip weight, (dim,).
        z: Gate, (batch, dim, length); the result is multiplied by silu(z).
        delta_bias: Added to delta before softplus, (dim,).
        delta_softplus: Whether delta goes through softplus.
        return_last_state: Whether to return the state after the last step as well.
        reverse: Scan from the last token, or step, to the first.  The result keeps the order of u.
        out_dtype: Of the result, a floating-point one; u's by default.
        order: Token at each step, (steps, groups) or (batch, steps, groups), from `order_table`.
        order_params: Whether delta, B and C are those of tokens; else of steps, as many as these.

    Returns:
        y, (batch, dim, length), and, except by backend cuda or with an order, with u's strides; 0
        where the order does not come; with `return_last_state` also h, (batch, dim, state).  The
        state is float32, or float64 if u is.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or an argument is not as above.
        BackendError: If a backend is forced that cannot run these tensors.

    Source: Gu and Dao, "Mamba", arXiv:2312.00752, equations 2 and 4, with delta B for the
        discretized B, as in the authors' code; for orders Liu et al., "VMamba", arXiv:2401.10166,
        and, with order_params=False, Yang et al., "PlainMamba", arXiv:2403.17695.
    """
    expect_tensors(u=u, delta=delta, A=A, B=B, C=C)
    flags(delta_softplus=delta_softplus, return_last_state=return_last_state, reverse=reverse)
    B, C = (w.unsqueeze(1) if w.dim() == 3 else w for w in (B, C))
    tensors = u, delta, A, B, C, D, z, delta_bias
    options = dict(softplus=delta_softplus, reverse=reverse, order_params=order_params)
    y, last_state = _checked(tensors, order, out_dtype=out_dtype, **options)
    return (y, last_state) if return_last_state else y


def _checked(
    tensors: tuple[Any, ...],
    order: Tensor | None,
    *,
    order_params: bool,
    out_dtype: torch.dtype | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Check shapes, dtypes and devices, and run a backend."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    flags(order_params=order_params)
    _check_u(u, A)
    (batch, dim, length), groups = u.shape, None
    walked, widths = length, [dim]
    if order is not None:
        expect_order(order, u)
        dim, (steps, groups) = len(A), order.shape[-2:]
        walked, widths = length if order_params else steps, [dim, dim // groups]
    for name, tensor, count in (("u", u, length), ("delta", delta, walked)):
        width = tensor.shape[1] if tensor.dim() == 3 and tensor.shape[1] in widths else dim
        expect_beside(name, tensor, (batch, width, count), u)
    expect_beside("A", A, (dim, A.shape[1]), u)
    _check_weights(u, {"B": B, "C": C}, (dim, A.shape[1], walked), groups)
    for name, tensor, shape in (
        *(("z", z, (batch, dim, length)), ("D", D, (dim,))),
        ("delta_bias", delta_bias, (dim,)),
    ):
        if tensor is not None:
            expect_beside(name, tensor, shape, u)
    options["out_dtype"] = u.dtype if out_dtype is None else out_dtype
    expect_dtype("out_dtype", options["out_dtype"])
    if order is None:
        return _pair(SELECTIVE_SCAN.pick(u, A, B, C)(*tensors, **options))
    run = ORDERED_SCAN.pick(u, A, B, C)
    return _pair(run(*tensors, order=order, order_params=order_params, **options))


def _pair(result: Any) -> tuple[Tensor, Tensor]:
    y, last_state = result
    return y, last_state


def _check_u(u: Tensor, A: Tensor) -> None:
    if u.dim() != 3 or u.shape[1] < 1 or u.shape[2] < 1:
        shape = tuple(u.shape)
        raise ValueError(f"u has shape {shape}, expected (batch, dim >= 1, length >= 1)")
    if A.dim() != 2 or A.is_complex() or A.shape[1] < 1:
        given = f"{A.dtype} of shape {tuple(A.shape)}"
        raise ValueError(f"A is {given}, expected real (dim, state >= 1)")


def _check_weights(
    u: Tensor, weights: dict[str, Tensor], sizes: tuple[int, int, int], expected: int | None
) -> None:
    """Check B and C by dim, state and length, and by the groups of an order."""
    dim, state, length = sizes
    for name, weight in weights.items():
        groups = weight.shape[1] if weight.dim() == 4 else 1
        if groups < 1 or dim % groups:
            raise ValueError(f"{name} has {groups} groups, expected a divisor of {dim} channels")
        constant = weight.dim() == 2
        shape = (dim, state) if constant else (u.shape[0], expected or groups, state, length)
        expect_beside(name, weight, shape, u)


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
    order: Tensor | None = None,
    order_params: bool = True,
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
        order: As in `selective_scan`; numba's kernels alone take one.
        order_params: Likewise.
        softplus: Whether delta goes through softplus.
        reverse: Whether the scan goes from the last token to the first.
        out_dtype: Of the result.

    Returns:
        y, the last state, and the step size, (batch, dim, length), float32, or an empty tensor.
    """
    inputs = (*tensors, skipped, skipped_dt, order)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    options = dict(softplus=softplus, reverse=reverse, kernels=kernels.name)
    y, last_state, dt, _, _ = _forward(
        *inputs, **options, gap_policy=gap_policy, out_dtype=out_dtype, keep=keep,
        return_dt=return_dt, order_params=order_params,
    )  # fmt: skip
    return y, last_state, dt


def _plain(kernels: KernelSet, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return fused_scan(kernels, *tensors, **options)[:2]


def _composed(
    *tensors: Any, order: Tensor, order_params: bool, out_dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor]:
    """Gather tokens step by step, scan them, and put the results back."""
    u, delta, A, B, C, D, z, bias = tensors
    dim, groups, length = len(A), order.shape[-1], u.shape[2]

    def walked(x: Tensor) -> Tensor:  # (batch, dim or width, length) -> (batch, dim, steps)
        own = x.shape[1] == dim
        return to_steps(x.mT.unflatten(2, (groups, -1)) if own else x.mT, order).flatten(2).mT

    if order_params:
        delta = walked(delta)
        B, C = (
            w if w.dim() == 2 else to_steps(w.permute(0, 3, 1, 2), order).permute(0, 2, 3, 1)
            for w in (B, C)
        )
    elif delta.shape[1] < dim:
        delta = delta.mT.repeat(1, 1, groups).mT
    y, last_state = selective_scan(
        *(walked(u), delta, A, B, C, D, None, bias),
        delta_softplus=options["softplus"],
        return_last_state=True,
        reverse=options["reverse"],
        out_dtype=torch.promote_types(u.dtype, torch.float32),
    )
    y = to_tokens(y.mT.unflatten(2, (groups, -1)), order, length).flatten(2).mT
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(out_dtype), last_state


def _by_token(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).unsqueeze(
        0
    )  # (batch, ..., length) -> (1 direction, batch, length, ...)


def _output(
    x: Tensor, tensors: tuple[Any, ...], dtype: torch.dtype | None = None, *, zero: bool = True
) -> Tensor:
    """Return an output as long as x, of all channels of the scan, in x's strides if x has them.

    It is 0 if an order does not come to all tokens.
    """
    dim, order = len(tensors[2]), tensors[10]
    some = zero and order is not None and order.shape[-2] < x.shape[2]
    out = torch.empty_like(x, dtype=dtype)
    if x.shape[1] != dim:
        out = x.new_empty(x.shape[0], x.shape[2], dim, dtype=dtype).mT
    return out.zero_() if some else out


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    """Sum a gradient of all channels over the groups, if x has the same channels for each."""
    if grad.shape == x.shape:
        return grad
    total: Tensor = grad.mT.unflatten(2, (-1, x.shape[1])).sum(dim=2).mT
    return total


def _arguments(
    tensors: tuple[Any, ...], kernels: str, *, order_params: bool
) -> tuple[list[Any], Tensor | None, dict[str, Any]]:
    """Return the kernels' arguments.

    Returns:
        u, delta, A, B, C, D, bias; z as (batch, length, dim); those about gaps and order by name.
    """
    u, delta, A, B, C, D, z, bias, skipped, skipped_dt, order = tensors
    cast = Tensor.float if kernels == NUMBA.name else Tensor.detach
    tokens = [_by_token(cast(x)) for x in (u, delta, B, C)]
    A = A.float().contiguous()
    D, bias = (None if x is None else [x.float().contiguous()] for x in (D, bias))
    arguments = [tokens[0], tokens[1], [A], tokens[2], tokens[3], D, bias]
    more = dict(skipped=None if skipped is None else skipped[None])
    more["skipped_dt"] = None if skipped_dt is None else _by_token(skipped_dt)
    if order is not None:
        more |= dict(order=order, order_params=order_params)
    return arguments, None if z is None else _by_token(cast(z))[0], more


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
    order_params: bool,
    kernels: str,
    out_dtype: torch.dtype,
    keep: bool,
    return_dt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, the step size, the states kept for backward, y before the gate.

    What is not wanted is empty.
    """
    run = kernel_set(kernels).load()
    arguments, z, more = _arguments(tensors, kernels, order_params=order_params)
    out = _output(tensors[0], tensors, out_dtype)
    y = out if z is None else _output(tensors[0], tensors, out_dtype)
    dt = _output(tensors[1], tensors, torch.float32) if return_dt else None
    last, kept = run.scan_forward(
        *arguments, _by_token(y), softplus=softplus, reverse=(reverse,), keep=keep, **more,
        gap_policy=gap_policy, dt=None if dt is None else _by_token(dt),
    )  # fmt: skip
    if z is not None:
        run.gate_forward(_by_token(y), z, _by_token(out)[0], None, scale=1.0)
    before = y if keep and z is not None else y.new_empty(0)
    return out, last[0], kept.new_empty(0) if dt is None else dt, kept, before


@_forward.register_fake
def _forward_shapes(*tensors: Any, **options: Any) -> Any:
    u, delta, A, _, _, _, z, *_, order = tensors
    (batch, _, length), (dim, state) = u.shape, A.shape
    out = _output(u, tensors, options["out_dtype"], zero=False)
    keep, single = options["keep"], torch.float32
    steps = length if order is None else order.shape[-2]
    shape = kernel_set(options["kernels"]).kept_shape(1, batch, steps, dim, state)
    kept = u.new_empty(shape if keep else 0, dtype=single)
    before = torch.empty_like(out) if keep and z is not None else out.new_empty(0)
    dt = _output(delta, tensors, single) if options["return_dt"] else kept.new_empty(0)
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
    order_params: bool,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of the inputs that have one and are not None, in order."""
    run, tensors, ddt = kernel_set(kernels).load(), rest[:-1], rest[-1]
    arguments, z, more = _arguments(tensors, kernels, order_params=order_params)
    grads: list[Any] = [None if x is None else torch.empty_like(x) for x in _learned(tensors)]
    grads[:2] = [_output(x, tensors) for x in tensors[:2]]
    dy = _by_token(_output(tensors[0], tensors).zero_() if grad is None else grad)
    if z is not None:
        dout, dz = dy, grads[6]
        dy = torch.empty_like(dout)
        run.gate_backward(dout[0], _by_token(y)[0], z, dy[0], _by_token(dz)[0], scale=1.0)
    outputs = [_by_token(x) for x in (grads[0], grads[1], grads[3], grads[4])]
    dlast = None if grad_state is None else grad_state.float().unsqueeze(0).contiguous()
    dA, dD, dbias = run.scan_backward(
        dy, dlast, kept, *arguments, *outputs, softplus=softplus, reverse=(reverse,), **more,
        gap_policy=gap_policy, ddt=None if ddt is None else _by_token(ddt),
        dskipped_dt=None if grads[8] is None else _by_token(grads[8]),
    )  # fmt: skip
    for n, parameter_grad in ((2, dA), (5, dD), (7, dbias)):
        if grads[n] is not None:
            grads[n].copy_(parameter_grad[0])
    grads[:2] = [_summed(dx, x) for dx, x in zip(grads[:2], tensors[:2], strict=True)]
    return [dx for dx in grads if dx is not None]


def _learned(tensors: Sequence[Any]) -> list[Any]:
    """Return the inputs without `skipped` and the order, which have no gradient."""
    return [*tensors[:8], tensors[9]]


@_backward.register_fake
def _backward_shapes(grad: Any, grad_state: Any, kept: Any, y: Any, *rest: Any, **_: Any) -> Any:
    del grad, grad_state, kept, y
    return [torch.empty_like(x) for x in _learned(rest[:-1]) if x is not None]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[3:])
    names = ("softplus", "reverse", "gap_policy", "order_params", "kernels")
    ctx.options = {name: keyword_only_inputs[name] for name in names}


def _gradient(ctx: Any, grad: Any, grad_state: Any, ddt: Any, *_: Any) -> Any:
    *inputs, kept, y = ctx.saved_tensors
    ddt = ddt if ddt is not None and ddt.numel() else None  # of an empty output
    grads = iter(_backward(grad, grad_state, kept, y, *inputs, ddt, **ctx.options))
    *first, last = (None if x is None else next(grads) for x in _learned(inputs))
    return *first, None, last, None


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
    Backend("reference", scan_loop),
)


ORDERED_SCAN = Table(
    "ordered_scan",
    Backend("numba", partial(_plain, NUMBA), partial(fused_unsupported, NUMBA), NUMBA.unavailable),
    Backend("reference", _composed),
    follows=SCAN,
)
