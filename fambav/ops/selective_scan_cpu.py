"""Selective scan for CPUs: chunks of batched calls, nothing but PyTorch, no compiler.

Only the inputs and the state before each chunk are kept for the backward pass, which makes each
chunk again.  Forward and backward are opaque operators to `torch.compile`, which would unroll their
loops.  On a GPU it runs as well, if nothing better is there: slowly, but in little memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fambav.ops.scan_chunks import Chunks, Views, block_size, by_step

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, "
    "*, bool softplus, bool reverse"
)


def refuses(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Say why these tensors cannot run here, or None."""
    del u, A
    if B.dim() != 4 or C.dim() != 4:
        return "B or C is the same at all times, expected one for each token"
    if B.shape[1] != C.shape[1]:
        return f"B has {B.shape[1]} groups and C {C.shape[1]}, expected the same"
    return None


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
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, last_state, _ = _forward(
        *tensors, softplus=softplus, reverse=reverse, out_dtype=out_dtype, keep=keep
    )
    return y, last_state


@custom_op(
    "fambav::chunked_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, ScalarType out_dtype, bool keep) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    *tensors: Any, softplus: bool, reverse: bool, out_dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and the states before each chunk or nothing."""
    u, views = tensors[0], Views.of(*tensors)
    (groups, state, width), (batch, dim, length) = views.A.shape, u.shape
    rows, steps = block_size(batch, dim, state, u.device)
    y = torch.empty_like(u, dtype=out_dtype)
    out = by_step(y, groups)
    h = views.A.new_zeros(batch, groups, state, width)
    kept = views.A.new_empty(-(-length // steps), batch if keep else 0, groups, state, width)
    for block in _blocks(batch, rows):
        chunks = Chunks(views.A, rows=len(h[block]), steps=steps, reverse=reverse)
        places = out[:, block], h[block], kept[:, block]
        chunks.forward(views.rows(block), *places, softplus=softplus)
    return y, h.mT.flatten(1, 2).contiguous(), kept


@custom_op(
    "fambav::chunked_scan_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_y, Tensor? grad_state, Tensor kept, {_INPUTS}) -> Tensor[]",
)
def _backward(
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    kept: Tensor,
    *tensors: Any,
    softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Return the gradients of the tensors that there are, in order."""
    found: list[Any] = [None if x is None else torch.zeros_like(x) for x in tensors]
    views, grads = Views.of(*tensors), Views.of(*found)
    groups, state, width = views.A.shape
    batch = len(kept[0])
    rows, steps = block_size(batch, groups * width, state, kept.device)
    dy = torch.zeros_like(views.u) if grad_y is None else by_step(grad_y, groups)
    dh = views.A.new_zeros(batch, groups, state, width)
    if grad_state is not None:
        dh.copy_(grad_state.unflatten(1, (groups, width)).mT)
    for block in _blocks(batch, rows):
        chunks = Chunks(views.A, rows=len(dh[block]), steps=steps, reverse=reverse)
        places = grads.rows(block), dy[:, block], dh[block], kept[:, block]
        chunks.backward(views.rows(block), *places, softplus=softplus)
    found[2] = grads.A.mT.flatten(0, 1).contiguous()
    found[5], found[7] = (None if x is None else x.flatten() for x in (grads.D, grads.bias))
    pairs = zip(found, tensors, strict=True)
    return [dx.to(x.dtype) for dx, x in pairs if dx is not None]


def _blocks(batch: int, rows: int) -> list[slice]:
    """Cut the batch."""
    return [slice(i, min(i + rows, batch)) for i in range(0, batch, rows)]


@_forward.register_fake
def _forward_shapes(u: Tensor, *rest: Any, **options: Any) -> Any:
    B: Tensor = rest[2]
    (batch, dim, length), (_, groups, state, _) = u.shape, B.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    count = -(-length // block_size(batch, dim, state, u.device)[1])
    rows = batch if options["keep"] else 0
    kept = u.new_empty(count, rows, groups, state, dim // groups, dtype=dtype)
    y = torch.empty_like(u, dtype=options["out_dtype"])
    return y, u.new_empty(batch, dim, state, dtype=dtype), kept


@_backward.register_fake
def _backward_shapes(grad_y: Any, grad_state: Any, kept: Any, *inputs: Any, **options: Any) -> Any:
    del grad_y, grad_state, kept, options
    return [torch.empty_like(x) for x in inputs if x is not None]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[2])
    ctx.softplus, ctx.reverse = keyword_only_inputs["softplus"], keyword_only_inputs["reverse"]


def _gradient(ctx: Any, grad_y: Any, grad_state: Any, _: Any) -> Any:
    *inputs, kept = ctx.saved_tensors
    options = dict(softplus=ctx.softplus, reverse=ctx.reverse)
    grads = iter(_backward(grad_y, grad_state, kept, *inputs, **options))
    return tuple(None if x is None else next(grads) for x in inputs)


_forward.register_autograd(_gradient, setup_context=_setup)
