"""Weighted means over groups of tokens, for both streams of a model at once.

The gradient of a mean is a gather: each token gets its share of the gradient of its group.  The
backward pass needs no sum and keeps one share and one group index per token.

Source: the size-weighted averages of Bolya et al., "Token Merging", arXiv:2210.09461, section 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.library import custom_op

from fambav.arguments import refusal
from fambav.ops.derivatives import refuse
from fambav.ops.dispatch import Backend, Table, expect, expect_tensors, plain_autograd
from fambav.ops.kernels import NUMBA, TRITON, KernelSet, kernel_set, on_gpu
from fambav.ops.match import Selection


class Pooled(NamedTuple):
    """Tokens after pooling.

    Attributes:
        x: Mean of each group, (batch, kept, dim).
        residual: The same of the other stream, or None.
        size: Sum of each group's sizes, (batch, kept), float32.
        place: Group index of each token, (batch, length), int64.
    """

    x: Tensor
    residual: Tensor | None
    size: Tensor
    place: Tensor


def pool(
    x: Tensor, residual: Tensor | None, weight: Tensor, size: Tensor, selection: Selection
) -> Pooled:
    """Replace every group, a kept token and the sources merged into it, by its weighted mean.

    Both streams are averaged in float32 (float64 if they are) and come back in their own dtype.  A
    token without sources is unchanged to the last bit.  Weights and sizes get no gradient.

    Args:
        x: One stream, (batch, length, dim).
        residual: Another, shaped like x; None for none.
        weight: Weight of each token in its group, (batch, length), float32, at least 0, and greater
            for one that is kept.
        size: Summed within each group, (batch, length), float32.
        selection: The groups and their new order; every token is in one.

    Returns:
        A token for each group, in the order of `selection.keep`.

    Raises:
        ValueError: If a shape does not fit that of x, or the selection's shapes each other, or if
            numba's kernels meet a token in no group.
        BackendError: If a backend is forced that cannot run these tensors.
    """
    if not isinstance(selection, Selection):
        raise refusal("selection", selection, "a Selection")
    expect_tensors(x=x, keep=selection.keep, source=selection.source, target=selection.target)
    if any(index.dtype != torch.int64 for index in selection[:3]):
        raise ValueError(f"selection is of {selection.keep.dtype}, expected torch.int64")
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, length, dim)")
    batch, length, _ = x.shape
    kept, count = selection.keep.shape[-1], selection.source.shape[-1]
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
    order = torch.arange(kept, device=keep.device).expand(batch, kept)  # of the groups
    nowhere = torch.zeros(batch, length, dtype=keep.dtype, device=keep.device)
    place = nowhere.scatter(1, keep, order)
    into = place.gather(1, target)
    place = place.scatter(1, source, into)

    groups = _Groups(_rows(keep, length), _rows(source, length), _rows(into, kept))
    both = groups.total(torch.stack((weight, size), dim=-1).flatten(0, 1))
    total, size = both.unflatten(0, (batch, kept)).unbind(-1)
    share = weight.to(torch.promote_types(x.dtype, weight.dtype)) / total.gather(1, place)
    arguments = kept, share.flatten(), _rows(place, kept), *groups
    mean = _mean if plain_autograd() else _Mean.apply
    x_mean = cast(Tensor, mean(x, *arguments))
    residual_mean = None if residual is None else cast(Tensor, mean(residual, *arguments))
    return Pooled(x_mean, residual_mean, size, place)


class _Groups(NamedTuple):
    """Row indices into the flattened batch.

    Attributes:
        keep: Kept rows, (batch kept,).
        source: Merged rows, (batch count,).
        into: Of each source, the row of the result, (batch count,).
    """

    keep: Tensor
    source: Tensor
    into: Tensor

    def total(self, rows: Tensor) -> Tensor:
        """Sum `rows`, (batch length, n), within each group, in a fixed order."""
        moved = rows.index_select(0, self.source)
        return rows.index_select(0, self.keep).index_put_((self.into,), moved, accumulate=True)


def _mean(
    x: Tensor,
    kept: int,
    share: Tensor,
    place: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
) -> Tensor:
    """Average one stream within each group."""
    del place
    rows = x.flatten(0, 1)
    out = _scaled(rows.index_select(0, keep), share.index_select(0, keep))
    moved = _scaled(rows.index_select(0, source), share.index_select(0, source))
    out.index_put_((into,), moved, accumulate=True)
    return out.to(x.dtype).view(x.shape[0], kept, x.shape[2])


class _Mean(torch.autograd.Function):
    """`_mean`; its gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:2])
        ctx.shape = x.shape
        return _mean(x, kept, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        share, place = ctx.saved_tensors
        rows = _scaled(grad.flatten(0, 1).index_select(0, place), share)
        return (rows.to(grad.dtype).view(ctx.shape), *(None,) * 6)


def _scaled(rows: Tensor, share: Tensor) -> Tensor:
    """Multiply each row by its share, at least in float32; may overwrite `rows`."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype).mul_(share.to(dtype)[:, None])


def _rows(index: Tensor, length: int) -> Tensor:
    """Turn indices along sequences of `length`, (batch, n), into row indices of the batch."""
    first = torch.arange(index.shape[0], device=index.device)[:, None] * length
    return (index + first).flatten()


def _fused(kernels: KernelSet, x: Tensor, residual: Tensor | None, *tensors: Tensor) -> Pooled:
    x, pooled, size, _, place = _forward(x, residual, *tensors, kernels=kernels.name)
    return Pooled(x, None if residual is None else pooled, size, place)


def _unsupported(kernels: KernelSet, *tensors: Tensor) -> str | None:
    """Return why a set of kernels cannot take these tensors, streams first, or None."""
    numbers = (t for t in tensors if t.is_floating_point() and t.dtype not in kernels.dtypes)
    return kernels.unsupported(next(numbers, tensors[0]), *tensors)


@custom_op(
    "fambav::pool",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor weight, Tensor size, Tensor keep, Tensor source,"
    " Tensor target, *, str kernels) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor, residual: Tensor | None, *tensors: Tensor, kernels: str
) -> tuple[Tensor, ...]:
    """Return both streams (the second may be empty), size, and share and group of each token."""
    run = kernel_set(kernels).load()
    pooled: tuple[Tensor, ...] = run.pool_forward(x, residual, *tensors)
    return pooled


@_forward.register_fake
def _forward_shapes(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    size: Tensor,
    keep: Tensor,
    *_: Tensor,
    kernels: str,
) -> tuple[Tensor, ...]:
    del weight, kernels
    shape = (*keep.shape, x.shape[2])
    other = x.new_empty(0) if residual is None else residual.new_empty(shape)
    share = torch.empty_like(size, memory_format=torch.contiguous_format)
    return x.new_empty(shape), other, size.new_empty(keep.shape), share, share.to(keep.dtype)


@custom_op(
    "fambav::pool_backward",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor share, Tensor place, *, str kernels) -> Tensor[]",
)
def _backward(grads: list[Tensor], share: Tensor, place: Tensor, *, kernels: str) -> list[Tensor]:
    """Return the gradients of the streams whose means have these gradients."""
    streams: list[Tensor] = kernel_set(kernels).load().pool_backward(grads, share, place)
    return streams


@_backward.register_fake
def _backward_shapes(
    grads: list[Tensor], share: Tensor, place: Tensor, *, kernels: str
) -> list[Tensor]:
    del place, kernels
    return [grad.new_empty(*share.shape, grad.shape[2]) for grad in grads]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    residual, (_, other, size, share, place) = inputs[1], output
    no_gradient = (size, share, place) if residual is not None else (other, size, share, place)
    ctx.mark_non_differentiable(*no_gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(share, place)
    ctx.kernels = keyword_only_inputs["kernels"]


def _gradient(ctx: Any, *grads: Any) -> Any:
    streams = grads[:2]
    present = [grad for grad in streams if grad is not None]
    inputs = iter(_backward(present, *ctx.saved_tensors, kernels=ctx.kernels))
    return *(None if grad is None else next(inputs) for grad in streams), *(None,) * 5


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(refuse("pool"))

POOL = Table(
    "pool",
    Backend(
        "triton",
        partial(_fused, TRITON),
        partial(_unsupported, TRITON),
        TRITON.unavailable,
        default=on_gpu,
    ),
    Backend("numba", partial(_fused, NUMBA), partial(_unsupported, NUMBA), NUMBA.unavailable),
    Backend("reference", _reference),
)
