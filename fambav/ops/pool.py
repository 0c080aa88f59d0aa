"""Weighted means over groups of tokens, for both streams of a model at once.

The gradient of a mean is a lookup: each token takes its share of what its group got, so nothing is
added up in the backward pass.  Kept for it are one share and one place of each token.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.library import custom_op

from fambav.ops.dispatch import Backend, Table, expect
from fambav.ops.kernels import TRITON, on_gpu
from fambav.ops.match import Selection


class Pooled(NamedTuple):
    """What is left of tokens when groups have become their means.

    Attributes:
        x: Mean of each group, (batch, kept, dim).
        residual: The same of the other stream, or None.
        size: Sum of each group's sizes, (batch, kept), float32.
        place: Which group each token is in, (batch, length), int64.
    """

    x: Tensor
    residual: Tensor | None
    size: Tensor
    place: Tensor


def pool(
    x: Tensor, residual: Tensor | None, weight: Tensor, size: Tensor, selection: Selection
) -> Pooled:
    """Replace every group, a kept token and the sources folded into it, by its weighted mean.

    Both streams are averaged in float32 (float64 if they are) and come back in their own dtype.  A
    token without sources is unchanged to the last bit.  Weights and sizes get no gradient.

    Args:
        x: One stream, (batch, length, dim).
        residual: Another, shaped like x; None for none.
        weight: Weight of each token in its group, (batch, length), float32, at least 0, and greater
            for one that is kept.
        size: What is added up within each group, (batch, length), float32.
        selection: The groups and their new order; every place is in one.

    Returns:
        A token for each group, in the order of `selection.keep`.

    Raises:
        ValueError: If a shape does not fit that of x, or the selection's shapes each other.
    """
    batch, length, _ = x.shape
    kept, count = selection.keep.shape[1], selection.source.shape[1]
    if residual is not None:
        expect("residual", residual, x.shape)
    for name, tensor in (("weight", weight), ("size", size)):
        expect(name, tensor, (batch, length))
    expect("keep", selection.keep, (batch, length - count))
    expect("source", selection.source, (batch, length - kept))
    expect("target", selection.target, (batch, count))
    streams = (x,) if residual is None else (x, residual)
    groups = selection[:3]
    run = POOL.pick(*streams, weight, size, *groups)
    return cast(Pooled, run(x, residual, weight.detach(), size.detach(), *groups))


def _reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    size: Tensor,
    keep: Tensor,
    source: Tensor,
    target: Tensor,
) -> Pooled:
    (batch, length), kept = size.shape, keep.shape[1]
    order = torch.arange(kept, device=keep.device).expand(batch, kept)
    place = torch.zeros(batch, length, dtype=keep.dtype, device=keep.device)
    into = place.scatter_(1, keep, order).gather(1, target)
    place.scatter_(1, source, into)

    groups = _Groups(_rows(keep, length), _rows(source, length), _rows(into, kept))
    both = groups.total(torch.stack((weight, size), dim=-1).flatten(0, 1))
    total, size = both.unflatten(0, (batch, kept)).unbind(-1)
    share = weight.to(torch.promote_types(x.dtype, weight.dtype)) / total.gather(1, place)
    given = share.flatten(), _rows(place, kept), *groups
    x_mean: Tensor = _Mean.apply(x, *given)
    residual_mean = None if residual is None else cast(Tensor, _Mean.apply(residual, *given))
    return Pooled(x_mean, residual_mean, size, place)


class _Groups(NamedTuple):
    """Rows of a batch laid end to end: kept, disappearing, and where the latter go afterwards."""

    keep: Tensor
    source: Tensor
    into: Tensor

    def total(self, rows: Tensor) -> Tensor:
        """Add `rows`, (batch * length, n), up within each group, in an order that is fixed."""
        moved = rows.index_select(0, self.source)
        return rows.index_select(0, self.keep).index_put_((self.into,), moved, accumulate=True)


class _Mean(torch.autograd.Function):
    """Weighted group means of one stream."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        share: Tensor,
        place: Tensor,
        keep: Tensor,
        source: Tensor,
        into: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(share, place)
        rows = x.flatten(0, 1)
        out = _scaled(rows.index_select(0, keep), share.index_select(0, keep))
        moved = _scaled(rows.index_select(0, source), share.index_select(0, source))
        out.index_put_((into,), moved, accumulate=True)
        return out.to(x.dtype).view(x.shape[0], -1, x.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        share, place = ctx.saved_tensors
        rows = _scaled(grad.flatten(0, 1).index_select(0, place), share)
        return (rows.to(grad.dtype).view(grad.shape[0], -1, grad.shape[2]), *(None,) * 5)


def _scaled(rows: Tensor, share: Tensor) -> Tensor:
    """Multiply each row by its share, at least in float32, reusing the memory of `rows`."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype).mul_(share.to(dtype)[:, None])


def _rows(places: Tensor, length: int) -> Tensor:
    """Turn places along sequences of `length`, (batch, n), into rows of (batch * length, dim)."""
    first = torch.arange(places.shape[0], device=places.device)[:, None] * length
    return (places + first).flatten()


def _triton(x: Tensor, residual: Tensor | None, *tensors: Tensor) -> Pooled:
    x, pooled, size, _, place = _forward(x, residual, *tensors)
    return Pooled(x, None if residual is None else pooled, size, place)


def _refuses(*tensors: Tensor) -> str | None:
    if any(t.dtype == torch.float64 for t in tensors):
        return "a tensor is float64, expected float32, float16 or bfloat16"
    return TRITON.refuses(*tensors)


@custom_op(
    "fambav::pool",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor weight, Tensor size, Tensor keep, Tensor source,"
    " Tensor target) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(x: Tensor, residual: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return both streams (the second empty if there is none), size, and share and place."""
    from fambav.ops.triton_kernels.pool import pool_forward

    pooled: tuple[Tensor, ...] = pool_forward(x, residual, *tensors)
    return pooled


@_forward.register_fake
def _forward_shapes(
    x: Tensor, residual: Tensor | None, weight: Tensor, size: Tensor, keep: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    del weight
    shape = (*keep.shape, x.shape[2])
    other = x.new_empty(0) if residual is None else residual.new_empty(shape)
    share = torch.empty_like(size, memory_format=torch.contiguous_format)
    return x.new_empty(shape), other, size.new_empty(keep.shape), share, share.to(keep.dtype)


@custom_op(
    "fambav::pool_backward",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor share, Tensor place) -> Tensor[]",
)
def _backward(grads: list[Tensor], share: Tensor, place: Tensor) -> list[Tensor]:
    """Return the gradients of the streams whose means have these gradients."""
    from fambav.ops.triton_kernels.pool import pool_backward

    found: list[Tensor] = pool_backward(grads, share, place)
    return found


@_backward.register_fake
def _backward_shapes(grads: list[Tensor], share: Tensor, place: Tensor) -> list[Tensor]:
    del place
    return [grad.new_empty(*share.shape, grad.shape[2]) for grad in grads]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    residual, (_, other, *numbers) = inputs[1], output
    ctx.mark_non_differentiable(*numbers, *([other] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*numbers[1:])


def _gradient(ctx: Any, *grads: Any) -> Any:
    streams = grads[:2]
    found = iter(_backward([grad for grad in streams if grad is not None], *ctx.saved_tensors))
    return *(None if grad is None else next(found) for grad in streams), *(None,) * 5


_forward.register_autograd(_gradient, setup_context=_setup)

POOL = Table(
    "pool",
    Backend("triton", _triton, _refuses, TRITON.missing, default=on_gpu),
    Backend("reference", _reference),
)
