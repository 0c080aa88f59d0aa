"""Bipartite soft matching: the most similar pairs of tokens, and the token orders made of them.

Tokens at even indices are compared with tokens at odd ones.  Each even token is matched to the most
similar odd token, and the `count` most similar pairs are chosen.

The whole choice is one operator, opaque to `torch.compile` and without a gradient.  Scores are full
float32 products in every backend, whatever matmul precision is set.

Source: Bolya et al., "Token Merging", arXiv:2210.09461, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fambav.arguments import refusal, whole
from fambav.ops.cross_scan import select_rows
from fambav.ops.dispatch import Backend, Table, expect_tensors, without_autocast
from fambav.ops.kernels import NUMBA, TRITON, on_gpu

_Indices = tuple[Tensor, Tensor, Tensor]


class Selection(NamedTuple):
    """Which tokens are kept and which are merged into others, as indices before the reduction.

    No token is both kept and merged; one that is neither is dropped.

    Attributes:
        keep: Kept tokens, in their new order, (batch, kept), int64.
        source: Tokens that are merged into others, (batch, count), int64.
        target: Tokens that they are merged into, each in keep, (batch, count), int64; may repeat.
        silent: Sources of which only the residual stream is merged, (batch, count), bool; None for
            none.
    """

    keep: Tensor
    source: Tensor
    target: Tensor
    silent: Tensor | None = None


def match(x: Tensor, count: int, *, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the most similar pairs of an even and an odd index, by cosine similarity.

    Compared in float32.  Ties go to the lower index, among targets and among sources.  A token of
    zeros has similarity 0 to all others.  NaN scores rank highest.

    Args:
        x: Features to compare, (batch, length, dim).
        count: Pairs to choose, at most the even indices that are not masked.
        masked: Indices that are not paired, (batch, k), int64; None for none.

    Returns:
        source, target: Even and odd indices, the most similar pair first, (batch, count), int64.
        Sources are distinct.

    Raises:
        ValueError: If there are fewer than count even indices, or no odd one, or an argument is not
            one of those above.

    Source: Bolya et al., "Token Merging", arXiv:2210.09461, section 3.
    """
    expect_tensors(x=x)
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, length, dim)")
    if masked is None:
        masked = x.new_empty(x.shape[0], 0, dtype=torch.int64)
    expect_tensors(masked=masked)
    if masked.dtype != torch.int64 or masked.shape[:-1] != x.shape[:1]:
        given = f"{masked.dtype} of shape {tuple(masked.shape)}"
        raise ValueError(f"masked is {given}, expected torch.int64 of shape (batch, k)")
    selection = evens_then_odds(x, whole("count", count), masked)
    return selection.source, selection.target


def evens_then_odds(x: Tensor, count: int, cls_index: Tensor) -> Selection:
    """Pair even with odd indices; keep the remaining even ones first, then all odd ones.

    Args:
        x: Features to compare, (batch, length, dim).
        count: Pairs to choose, at most the even indices without a class token.
        cls_index: Class tokens, which are not paired, (batch, k), int64.

    Returns:
        The pairs of `match`; both parts of keep are ascending.

    Raises:
        ValueError: If there are fewer than count even indices, or no odd one.
    """
    return _select(x, count, cls_index, in_order=False)


def in_order(x: Tensor, count: int, cls_index: Tensor) -> Selection:
    """Pair every second patch with one between; keep the rest in order.

    Args:
        x: Features to compare, (batch, length, dim).
        count: Pairs to choose, at most half of the patches, rounded up.
        cls_index: Class tokens, which do not count as patches, (batch, k), int64.

    Returns:
        The pairs of `match` among the patches; keep is ascending.

    Raises:
        ValueError: If count is larger, or there are fewer than two patches.
    """
    return _select(x, count, cls_index, in_order=True)


def others(indices: Tensor, length: int) -> Tensor:
    """Return the indices of 0 .. length-1 that are not among `indices`, ascending.

    Args:
        indices: Distinct, (batch, k), int64.
        length: Number of all indices.

    Returns:
        (batch, length - k), int64.
    """
    expect_tensors(indices=indices)
    batch, k = indices.shape
    before = indices.sort(dim=1).values - torch.arange(k, device=indices.device)
    rank = torch.arange(length - k, device=indices.device).expand(batch, -1).contiguous()
    return rank + torch.searchsorted(before, rank, right=True)


def _select(x: Tensor, count: int, cls_index: Tensor, *, in_order: bool) -> Selection:
    evens, odds = halves(x.shape[1], cls_index.shape[1], in_order=in_order)
    if count > evens or not odds:
        most = evens if odds else 0
        raise refusal("count", count, f"at most {most} of {x.shape[1]} tokens")
    return Selection(*torch.ops.fambav.match(x.detach(), cls_index, count, in_order=in_order))


def halves(length: int, classes: int, *, in_order: bool) -> tuple[int, int]:
    """Return the numbers of even and of odd tokens."""
    compared = length - classes if in_order else length
    return compared - compared // 2, compared // 2


# `custom_op` would add autograd layers, which cost as much as the matching of a short sequence.
torch.library.define(
    "fambav::match",
    "(Tensor x, Tensor cls_index, int count, *, bool in_order) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("fambav::match", "default")
def _match(x: Tensor, cls_index: Tensor, count: int, *, in_order: bool) -> _Indices:
    """Return keep, source and target of a `Selection`."""
    run = MATCH.pick(x, cls_index)
    indices: _Indices = run(x, cls_index, count, in_order=in_order)
    return indices


def _shapes(x: Tensor, cls_index: Tensor, count: int, *, in_order: bool) -> _Indices:
    del cls_index, in_order
    batch, length, _ = x.shape
    keep, source, target = (
        x.new_empty(batch, n, dtype=torch.int64) for n in (length - count, count, count)
    )
    return keep, source, target


torch.library.register_fake("fambav::match", _shapes)


def _vmap(
    info: Any, axes: Any, x: Tensor, cls_index: Tensor, count: int, *, in_order: bool
) -> tuple[_Indices, tuple[int, int, int]]:
    """Match under `torch.func.vmap`: the mapped axis is part of the batch."""
    size = info.batch_size
    mapped = [
        t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)
        for t, axis in zip((x, cls_index), axes, strict=False)
    ]
    flat = (t.flatten(0, 1) for t in mapped)
    found = torch.ops.fambav.match(*flat, count, in_order=in_order)
    keep, source, target = (index.unflatten(0, (size, -1)) for index in found)
    return (keep, source, target), (0, 0, 0)


torch.library.register_vmap("fambav::match", _vmap)


def _triton(x: Tensor, cls_index: Tensor, count: int, *, in_order: bool) -> _Indices:
    from fambav.ops.triton.match import select

    indices: _Indices = select(x, cls_index, count, in_order=in_order)
    return indices


def _numba(x: Tensor, cls_index: Tensor, count: int, *, in_order: bool) -> _Indices:
    run, length, masked = NUMBA.load(), x.shape[1], cls_index
    patches = none = cls_index[:, :0]
    if in_order and cls_index.shape[1]:
        x, patches = run.patches_of(x, cls_index)
    if in_order:
        masked = none
    product, norm = _products(x)
    indices: _Indices = run.choose_pairs(
        *(product, norm, count), patches=patches, masked=masked, length=length, in_order=in_order
    )
    return indices


def _reference(x: Tensor, cls_index: Tensor, count: int, *, in_order: bool) -> _Indices:
    length = x.shape[1]
    if in_order:
        patches = others(cls_index, length)
        features = select_rows(x, patches)  # (batch, patches, dim)
        source, target = (patches.gather(1, index) for index in _pairs(features, count))
        return others(source, length), source, target
    source, target = _pairs(x, count, masked=cls_index)
    even = 2 * others(source // 2, length - length // 2)
    odd = torch.arange(1, length, 2, device=x.device).expand(x.shape[0], -1)
    return torch.cat((even, odd), dim=1), source, target


def _products(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products of even and odd tokens, (batch, evens, odds), and the norms of all."""
    with without_autocast(x), _full_products():
        x = x.float()
        return x[:, 0::2] @ x[:, 1::2].mT, torch.linalg.vector_norm(x, dim=-1)


def _pairs(x: Tensor, count: int, *, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return source and target of `match`."""
    product, norm = _products(x)
    scale = 1 / norm.clamp_min(1e-12)
    # Nothing changes in place, so that the exported graph of a model can hold this.
    score = product * scale[:, 0::2, None] * scale[:, None, 1::2]
    if masked is not None and masked.shape[1]:
        alone = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        alone = alone.scatter(1, masked, value=True)
        score = score.masked_fill(alone[:, 0::2, None] | alone[:, None, 1::2], -torch.inf)
    best, partner = score.max(dim=-1)
    source = best.sort(dim=-1, descending=True, stable=True).indices.narrow(1, 0, count)
    return 2 * source, 2 * partner.gather(1, source) + 1


@contextmanager
def _full_products() -> Iterator[None]:
    """Disable TF32 and bfloat16 in float32 products; restore the setting afterwards."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # Once a program has set this newer property, torch refuses to read the older setting.
    devices: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
    settings = [device.matmul.fp32_precision for device in devices]
    for device in devices:
        device.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for device, setting in zip(devices, settings, strict=True):
            device.matmul.fp32_precision = setting


MATCH = Table(
    "match",
    Backend("triton", _triton, TRITON.unsupported, TRITON.unavailable, default=on_gpu),
    Backend("numba", _numba, NUMBA.unsupported, NUMBA.unavailable),
    Backend("reference", _reference),
    differentiable=False,
)
