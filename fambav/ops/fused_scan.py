"""Selective scan by a set of compiled kernels, as one operator with a gradient.

The state before each chunk of steps is kept for the backward pass, which makes the rest again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fambav.ops.dispatch import Backend
from fambav.ops.kernels import NUMBA, TRITON, KernelSet, kernel_set, on_gpu

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias"
_OPTIONS = "*, bool softplus, bool reverse, str kernels"


def refuses(kernels: KernelSet, u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Say why these tensors cannot run here, or None."""
    if not len(u):
        return "the batch is empty"
    if B.dim() != 4 or C.dim() != 4:
        return "B or C is the same at all times, expected one for each token"
    if B.shape[1] != C.shape[1]:
        return f"B has {B.shape[1]} groups and C {C.shape[1]}, expected the same"
    return kernels.refuses(u, A, B, C)


def scan(
    kernels: KernelSet,
    *tensors: Tensor | None,
    softplus: bool,
    reverse: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scan as `selective_scan` says, with B and C of shape (batch, groups, state, length).

    Returns:
        y, (batch, dim, length), and the state after the last step, (batch, dim, state), float32.
    """
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    options = dict(softplus=softplus, reverse=reverse, kernels=kernels.name)
    y, last_state, _, _ = _forward(*tensors, out_dtype=out_dtype, keep=keep, **options)
    return y, last_state


TRITON_SCAN = Backend(
    "triton", partial(scan, TRITON), partial(refuses, TRITON), TRITON.missing, default=on_gpu
)
NUMBA_SCAN = Backend("numba", partial(scan, NUMBA), partial(refuses, NUMBA), NUMBA.missing)


def _by_token(x: Tensor) -> Tensor:
    """View (batch, ..., length) as one direction of (1, batch, length, ...)."""
    return x.movedim(-1, 1).unsqueeze(0)


def _arguments(tensors: tuple[Any, ...], kernels: str) -> tuple[list[Any], Tensor | None]:
    """Return what the kernels take, (u, delta, A, B, C, D, bias), and z by token."""
    u, delta, A, B, C, D, z, bias = tensors
    cast = Tensor.float if kernels == NUMBA.name else Tensor.detach
    tokens = [_by_token(cast(x)) for x in (u, delta, B, C)]
    A = A.float().contiguous()
    each = [None if x is None else [x.float().contiguous()] for x in (D, bias)]
    given = [tokens[0], tokens[1], [A], tokens[2], tokens[3], *each]
    return given, None if z is None else _by_token(cast(z))[0]


@custom_op(
    "fambav::fused_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, ScalarType out_dtype, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    *tensors: Any, softplus: bool, reverse: bool, kernels: str, out_dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, the states kept, and y before the gate or nothing."""
    run = kernel_set(kernels).load()
    given, z = _arguments(tensors, kernels)
    out = torch.empty_like(tensors[0], dtype=out_dtype)
    y = out if z is None else torch.empty_like(out)
    options = dict(softplus=softplus, reverse=(reverse,))
    last, kept = run.scan_forward(*given, _by_token(y), **options, keep=keep)
    if z is not None:
        run.gate_forward(_by_token(y), z, _by_token(out)[0], None, scale=1.0)
    return out, last[0], kept, y if keep and z is not None else y.new_empty(0)


@_forward.register_fake
def _forward_shapes(*tensors: Any, **options: Any) -> Any:
    u, _, A, _, _, _, z, _ = tensors
    (batch, dim, length), state = u.shape, A.shape[1]
    out = torch.empty_like(u, dtype=options["out_dtype"])
    keep = options["keep"]
    shape = kernel_set(options["kernels"]).load().kept_shape(1, batch, length, dim, state)
    kept = u.new_empty(shape if keep else 0, dtype=torch.float32)
    before = torch.empty_like(out) if keep and z is not None else out.new_empty(0)
    return out, u.new_empty(batch, dim, state, dtype=torch.float32), kept, before


@custom_op(
    "fambav::fused_scan_backward",
    mutates_args=(),
    schema=f"(Tensor? grad, Tensor? grad_state, Tensor kept, Tensor y, {_INPUTS}, {_OPTIONS})"
    " -> Tensor[]",
)
def _backward(
    grad: Tensor | None,
    grad_state: Tensor | None,
    kept: Tensor,
    y: Tensor,
    *tensors: Any,
    softplus: bool,
    reverse: bool,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of the tensors that there are, in order."""
    run = kernel_set(kernels).load()
    given, z = _arguments(tensors, kernels)
    grads: list[Any] = [None if x is None else torch.empty_like(x) for x in tensors]
    dy = torch.zeros_like(tensors[0]) if grad is None else grad
    dy = _by_token(dy)
    if z is not None:
        dz, after = grads[6], dy
        dy = torch.empty_like(after)
        run.gate_backward(after[0], _by_token(y)[0], z, dy[0], _by_token(dz)[0], scale=1.0)
    places = [_by_token(x) for x in (grads[0], grads[1], grads[3], grads[4])]
    dlast = None if grad_state is None else grad_state.float().unsqueeze(0).contiguous()
    options = dict(softplus=softplus, reverse=(reverse,))
    dA, dD, dbias = run.scan_backward(dy, dlast, kept, *given, *places, **options)
    for n, found in ((2, dA), (5, dD), (7, dbias)):
        if grads[n] is not None:
            grads[n].copy_(found[0])
    return [dx for dx in grads if dx is not None]


@_backward.register_fake
def _backward_shapes(grad: Any, grad_state: Any, kept: Any, y: Any, *tensors: Any, **_: Any) -> Any:
    del grad, grad_state, kept, y
    return [torch.empty_like(x) for x in tensors if x is not None]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.options = {name: keyword_only_inputs[name] for name in ("softplus", "reverse", "kernels")}


def _gradient(ctx: Any, grad: Any, grad_state: Any, *_: Any) -> Any:
    *inputs, kept, y = ctx.saved_tensors
    grads = iter(_backward(grad, grad_state, kept, y, *inputs, **ctx.options))
    return tuple(None if x is None else next(grads) for x in inputs)


_forward.register_autograd(_gradient, setup_context=_setup)
