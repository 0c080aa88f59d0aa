"""Which tokens are alike: the balanced bipartite matching, and the orders made of it.

Tokens at even places are compared with tokens at odd places.  Each even token points at the odd
token most like it, and the count most similar pairs are chosen.

The whole choice is one operator, opaque to `torch.compile` and without a gradient.  Scores are full
float32 products in every backend, whatever precision is set for other products.

Source: Bolya et al., "Token Merging", arXiv:2210.09461, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fambav.ops.dispatch import Backend, Table, without_autocast
from fambav.ops.kernels import TRITON, on_gpu

_Places = tuple[Tensor, Tensor, Tensor]


class Selection(NamedTuple):
    """Which tokens one call keeps and which it folds into others, as places before the call.

    No place is both kept and folded; one that is neither is dropped.

    Attributes:
        keep: Tokens that stay, in their new order, (batch, kept), int64.
        source: Tokens that are folded into others, (batch, count), int64.
        target: Tokens that absorb them, each in keep, (batch, count), int64; may repeat.
        silent: Sources of which only the residual stream is folded in, (batch, count), bool; None
            for none.
    """

    keep: Tensor
    source: Tensor
    target: Tensor
    silent: Tensor | None = None


def match(x: Tensor, count: int, *, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the pairs of an even and an odd place that are most alike, by cosine.

    Compared in float32.  Of equal scores the lower place wins, among targets and among sources.
    A token of zeros is equally unlike all others.  A score that is no number is above all others.

    Args:
        x: Features to compare, (batch, length, dim).
        count: Pairs to choose, at most the even places that may be paired.
        masked: Places that may not be paired, (batch, k), int64; None if all may.

    Returns:
        source, target: Even and odd places, the best pair first, (batch, count), int64.  Sources
        are distinct.

    Raises:
        IndexError: If there are fewer than count even places, or no odd one.
    """
    nobody = x.new_empty(len(x), 0, dtype=torch.int64)
    selection = evens_then_odds(x, count, nobody if masked is None else masked)
    return selection.source, selection.target


def evens_then_odds(x: Tensor, count: int, class_places: Tensor) -> Selection:
    """Pair even with odd places; the even ones that are left come first, then all odd ones.

    Args:
        x: Features to compare, (batch, length, dim).
        count: Pairs to make, at most the even places without a class token.
        class_places: Tokens that stay alone, (batch, k), int64.

    Returns:
        The pairs as `match` chooses them, and both parts in ascending order.

    Raises:
        IndexError: If there are fewer than count even places, or no odd one.
    """
    return _select(x, count, class_places, in_order=False)


def in_order(x: Tensor, count: int, class_places: Tensor) -> Selection:
    """Pair every second patch with one between; what is left stays in its order.

    Args:
        x: Features to compare, (batch, length, dim).
        count: Pairs to make, at most half of the patches, rounded up.
        class_places: Tokens that do not count as patches, (batch, k), int64.

    Returns:
        The pairs as `match` chooses them among the patches, and all places that are left in
        ascending order.

    Raises:
        IndexError: If count is larger, or there are fewer than two patches.
    """
    return _select(x, count, class_places, in_order=True)


def others(places: Tensor, length: int) -> Tensor:
    """Return the places of 0 .. length-1 that are not among `places`, ascending.

    Args:
        places: Distinct places, (batch, k), int64.
        length: Places there are.

    Returns:
        (batch, length - k), int64.
    """
    batch, k = places.shape
    skipped = places.sort(dim=1).values - torch.arange(k, device=places.device)
    rank = torch.arange(length - k, device=places.device).expand(batch, -1).contiguous()
    return rank + torch.searchsorted(skipped, rank, right=True)


def _select(x: Tensor, count: int, class_places: Tensor, *, in_order: bool) -> Selection:
    evens, odds = halves(x.shape[1], class_places.shape[1], in_order=in_order)
    if count > evens or not odds:
        raise IndexError(
            f"count is {count}, expected at most {evens if odds else 0} of {x.shape[1]} places"
        )
    return Selection(*torch.ops.fambav.match(x.detach(), class_places, count, in_order=in_order))


def halves(length: int, classes: int, *, in_order: bool) -> tuple[int, int]:
    """Return how many tokens are compared with how many others."""
    compared = length - classes if in_order else length
    return compared - compared // 2, compared // 2


# `custom_op` would add the layers of a gradient, which cost as much as a short sequence's choice.
torch.library.define(
    "fambav::match",
    "(Tensor x, Tensor class_places, int count, *, bool in_order) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("fambav::match", "default")
def _match(x: Tensor, class_places: Tensor, count: int, *, in_order: bool) -> _Places:
    """Return what a `Selection` holds."""
    run = MATCH.pick(x, class_places)
    places: _Places = run(x, class_places, count, in_order=in_order)
    return places


def _shapes(x: Tensor, class_places: Tensor, count: int, *, in_order: bool) -> _Places:
    del class_places, in_order
    batch, length, _ = x.shape
    keep, source, target = (
        x.new_empty(batch, n, dtype=torch.int64) for n in (length - count, count, count)
    )
    return keep, source, target


torch.library.register_fake("fambav::match", _shapes)


def _triton(x: Tensor, class_places: Tensor, count: int, *, in_order: bool) -> _Places:
    from fambav.ops.triton_kernels.match import select

    places: _Places = select(x, class_places, count, in_order=in_order)
    return places


def _reference(x: Tensor, class_places: Tensor, count: int, *, in_order: bool) -> _Places:
    length = x.shape[1]
    if in_order:
        patches = others(class_places, length)
        features = x.gather(1, patches[..., None].expand(-1, -1, x.shape[2]))
        source, target = (patches.gather(1, places) for places in _pairs(features, count))
        return others(source, length), source, target
    source, target = _pairs(x, count, masked=class_places)
    even = 2 * others(source // 2, length - length // 2)
    odd = torch.arange(1, length, 2, device=x.device).expand(x.shape[0], -1)
    return torch.cat((even, odd), dim=1), source, target


def _pairs(x: Tensor, count: int, *, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Do what `match` says."""
    with without_autocast(x), _full_products():
        x = x.float()
        even, odd = x[:, 0::2], x[:, 1::2]
        scale = 1 / x.norm(dim=-1).clamp_min(1e-12)
        # Nothing changes in place, so that the exported graph of a model can hold this.
        score = (even @ odd.mT) * scale[:, 0::2, None] * scale[:, None, 1::2]
    if masked is not None and masked.shape[1]:
        taken = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        taken = taken.scatter(1, masked, value=True)
        score = score.masked_fill(taken[:, 0::2, None] | taken[:, None, 1::2], -torch.inf)
    best, partner = score.max(dim=-1)
    source = best.sort(dim=-1, descending=True, stable=True).indices.narrow(1, 0, count)
    return 2 * source, 2 * partner.gather(1, source) + 1


@contextmanager
def _full_products() -> Iterator[None]:
    """Multiply float32 as it is, without TF32 or bfloat16, and leave what was set as it was."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # Where a program has set this newer property, torch refuses to answer in the older words.
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
    Backend("triton", _triton, TRITON.refuses, TRITON.missing, default=on_gpu),
    Backend("reference", _reference),
)
