"""Order tables: in which order each group of channels walks the tokens.

    order[t, g]      index of the token that group g reads and writes at step t

A table is (steps, groups), the same for every sample, or (batch, steps, groups), with as many steps
as there are tokens, or fewer where some are skipped.  Here are its check, and the composition with
gathers that a scan along a table is defined by; the numba scan walks by index instead.

Source: the scan orders of Liu et al., "VMamba", arXiv:2401.10166, and Yang et al., "PlainMamba",
arXiv:2403.17695; one table for all of them, and for kept tokens, is ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.ops.cross_scan import select_rows
from fambav.ops.dispatch import expect_tensors, plain_autograd


def order_table(order: Tensor, length: int) -> Tensor:
    """Check an order once, where it is made: a scan that looked at it would wait for the GPU.

    Args:
        order: Index of the token at each step, (steps, groups) or (batch, steps, groups), of any
            integer dtype; each group visits a token once at most.
        length: The number of tokens.

    Returns:
        The order in int64, contiguous.

    Raises:
        ValueError: If shape or dtype are not as above, or an entry is out of range or twice in a
            walk.
    """
    expect_tensors(order=order)
    shape, whole = tuple(order.shape), not (order.is_floating_point() or order.is_complex())
    if len(shape) not in (2, 3) or order.dtype == torch.bool or not whole:
        given = f"{order.dtype} of shape {shape}"
        raise ValueError(
            f"order is {given}, expected integers (steps, groups) or (batch, steps, groups)"
        )
    _expect_steps(order, length)
    order = order.long().contiguous()
    entries = order.transpose(-1, -2).sort().values  # (..., groups, steps)
    for entry in entries[(entries < 0) | (entries >= length)][:1].tolist():
        raise ValueError(
            f"order of shape {shape} has the entry {entry}, expected 0 to {length - 1} for tokens"
            f" of shape ({length},)"
        )
    for entry in entries[..., 1:][entries.diff() == 0][:1].tolist():
        raise ValueError(
            f"order of shape {shape} has the entry {entry} twice in a walk, expected each of the"
            f" tokens of shape ({length},) once at most"
        )
    return order


def _expect_steps(order: Tensor, length: int) -> None:
    if not (1 <= order.shape[-2] <= length and order.shape[-1] >= 1):
        raise ValueError(
            f"order has shape {tuple(order.shape)}, expected 1 to {length} steps of 1 group or more"
            f" along tokens of shape ({length},)"
        )


def expect_order(order: Tensor, u: Tensor) -> None:
    """Check shape, dtype and device of the order of a scan, not its entries.

    Args:
        order: As `order_table` returns it.
        u: What is scanned, (batch, channels, length).

    Raises:
        ValueError: If one does not fit.
    """
    expect_tensors(order=order)
    shape = tuple(order.shape)
    if order.dtype != torch.int64 or len(shape) not in (2, 3):
        raise ValueError(
            f"order is {order.dtype} of shape {shape}, expected torch.int64 (steps, groups) or"
            " (batch, steps, groups); fambav.ops.order_table makes it"
        )
    _expect_steps(order, u.shape[2])
    if len(shape) == 3 and shape[0] != u.shape[0]:
        raise ValueError(
            f"order has shape {shape}, expected ({u.shape[0]}, steps, groups) beside u of shape"
            f" {tuple(u.shape)}"
        )
    if order.device != u.device:
        raise ValueError(f"order is on {order.device}, expected {u.device}")


def to_steps(x: Tensor, order: Tensor) -> Tensor:
    """Read tokens in the order of each group.

    Args:
        x: (batch, length, groups, width), or (batch, length, width), which every group reads.
        order: Table.

    Returns:
        (batch, steps, groups, width).
    """
    order = order if order.dim() == 3 else order[None]
    there, back = _pairs(order, x.shape[1])
    if x.dim() == 4:
        return _move(x, there, back)
    if plain_autograd():
        return select_rows(x, order)
    out: Tensor = _Read.apply(x, order, back)
    return out


def to_tokens(x: Tensor, order: Tensor, length: int) -> Tensor:
    """Write what each step of each group has to its token.

    Args:
        x: (batch, steps, groups, width).
        order: Table.
        length: The number of tokens.

    Returns:
        (batch, length, groups, width), 0 where a group does not come.
    """
    there, back = _pairs(order if order.dim() == 3 else order[None], length)
    return _move(x, back, there)


def _pairs(order: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Number the pairs (token, group) of each step, and the pairs (step, group) of each token.

    Args:
        order: (batch or 1, steps, groups).
        length: The number of tokens.

    Returns:
        (batch or 1, steps, groups), and (batch or 1, length, groups), one above the last pair where
        no step comes.
    """
    batch, steps, groups = order.shape
    number = torch.arange(steps * groups, device=order.device).view(steps, groups)
    there = order * groups + number[0]
    back = order.new_full((batch, length * groups), steps * groups)
    back = back.scatter(1, there.flatten(1), number.flatten().expand(batch, -1))
    return there, back.view(batch, length, groups)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Take pairs of x, (batch, rows, groups, width); the one above the last is 0."""
    rows = x.flatten(1, 2)
    # A trace cannot compare sizes.
    if torch.jit.is_tracing() or index.shape[1] > x.shape[1]:  # type: ignore[attr-defined]
        rows = F.pad(rows, (0, 0, 0, 1))
    return select_rows(rows, index)


def _move(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    if plain_autograd():
        return _take(x, index)
    out: Tensor = _Move.apply(x, index, inverse)
    return out


class _Read(torch.autograd.Function):
    """Rows that every group reads; the gradient sums permutations: no scatter, no atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return select_rows(x, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (back,) = ctx.saved_tensors
        return _take(grad, back).sum(dim=2), None, None


class _Move(torch.autograd.Function):
    """`_take` of a table's pairs, whose gradient takes those of its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return _take(grad, inverse), None, None
