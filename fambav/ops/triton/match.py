"""Bipartite matching of tokens, as Triton kernels: no score is stored, and nothing is sorted.

    best partner    a program loops over all tiles of odd tokens for one tile of even tokens, and
                    keeps a running maximum of the scores and its index
    choose          a program ranks the even tokens of one sample by counting larger scores; a kept
                    token moves forward by the number of merged ones before it

Scores are float32 products summed in the same order for every pair, so equal tokens give equal
scores.  16-bit tokens are widened first: as they are, the kernel spills registers on sm_80.  NaN
becomes infinity, which ranks first, as in torch.sort.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fambav.ops.triton.launch import OPTIONS, POINTERS, on_device
from fambav.ops.triton.variant import Variant

TILE = dict(EVENS=64, ODDS=64, CHANNELS=32)  # of a product
TILE_WARPS = 8
RANKED = 4096  # pairs of tokens that a program compares at once
FEWEST = 64  # tokens of the smallest specialization that ranks
RANK_WARPS = 4


@triton.jit
def _index(rank, cls_index, classes):
    """Token index of patch number `rank`."""
    index = rank
    for i in range(classes):
        at = tl.load(cls_index + i).to(tl.int32)
        before = 0
        for j in range(classes):
            before += (tl.load(cls_index + j).to(tl.int32) < at).to(tl.int32)
        index += (rank >= at - before).to(tl.int32)
    return index


@triton.jit
def _token(rank, cls_index, classes, IN_ORDER: tl.constexpr):
    """Token index of a compared token."""
    return _index(rank, cls_index, classes) if IN_ORDER else rank


@triton.jit
def _is_cls(index, cls_index, classes):
    """Whether an index is a class token's."""
    is_cls = index < 0
    for i in range(classes):
        is_cls = is_cls | (index == tl.load(cls_index + i).to(tl.int32))
    return is_cls


@triton.jit
def _scale(squares):
    """Inverse of a norm; large and finite for zeros."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), 1e-12))


@triton.jit(do_not_specialize=["length", "classes"])
def _best_partner_kernel(
    x,
    cls_index,
    best,
    partner,
    length,
    classes,
    dim,
    x_batch,
    x_token,
    x_channel,
    IN_ORDER: tl.constexpr,
    EVENS: tl.constexpr,
    ODDS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    compared = length - classes if IN_ORDER else length
    odds = compared // 2
    evens = compared - odds
    tiles = tl.cdiv(evens, EVENS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    cls_index += sample * classes
    x += sample * x_batch

    even = (tl.program_id(0) % tiles) * EVENS + tl.arange(0, EVENS)
    is_even = even < evens
    even_index = _token(2 * even, cls_index, classes, IN_ORDER)
    even_x = x + even_index.to(tl.int64)[:, None] * x_token
    highest = tl.full([EVENS], float("-inf"), tl.float32)
    nearest = tl.zeros([EVENS], tl.int32)
    for start in range(0, odds, ODDS):
        odd = start + tl.arange(0, ODDS)
        is_odd = odd < odds
        odd_index = _token(2 * odd + 1, cls_index, classes, IN_ORDER)
        odd_x = x + odd_index.to(tl.int64)[:, None] * x_token
        score = tl.zeros([EVENS, ODDS], tl.float32)
        even_squares = tl.zeros([EVENS], tl.float32)
        odd_squares = tl.zeros([ODDS], tl.float32)
        for first in range(0, dim, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            inside = (channel < dim)[None, :]
            at = channel.to(tl.int64)[None, :] * x_channel
            a = tl.load(even_x + at, mask=is_even[:, None] & inside, other=0.0).to(tl.float32)
            b = tl.load(odd_x + at, mask=is_odd[:, None] & inside, other=0.0).to(tl.float32)
            score = tl.dot(a, tl.trans(b), score, input_precision="ieee")
            even_squares += tl.sum(a * a, axis=1)
            odd_squares += tl.sum(b * b, axis=1)
        score = score * _scale(even_squares)[:, None] * _scale(odd_squares)[None, :]
        score = tl.where(score != score, float("inf"), score)
        paired = is_odd[None, :]
        if not IN_ORDER:
            alone = _is_cls(even_index, cls_index, classes)[:, None]
            paired = paired & ~alone & ~_is_cls(odd_index, cls_index, classes)[None, :]
        score = tl.where(paired, score, float("-inf"))
        top = tl.max(score, axis=1)
        at_top = tl.where(score == top[:, None], odd[None, :], odds)
        nearest = tl.where(top > highest, tl.min(at_top, axis=1), nearest)
        highest = tl.maximum(highest, top)
    tl.store(best + sample * evens + even, highest, mask=is_even)
    tl.store(partner + sample * evens + even, nearest, mask=is_even)


@triton.jit(do_not_specialize=["length", "classes", "count"])
def _choose_kernel(
    best,
    partner,
    cls_index,
    keep,
    source,
    target,
    length,
    classes,
    count,
    IN_ORDER: tl.constexpr,
    EVENS: tl.constexpr,
    RIVALS: tl.constexpr,
):
    compared = length - classes if IN_ORDER else length
    odds = compared // 2
    evens = compared - odds
    sample = tl.program_id(0).to(tl.int64)
    best += sample * evens
    cls_index += sample * classes
    keep += sample * (length - count)

    i = tl.arange(0, EVENS)
    is_even = i < evens
    mine = tl.load(best + i, mask=is_even, other=float("-inf"))
    rank = tl.zeros([EVENS], tl.int32)
    for start in range(0, evens, RIVALS):
        j = start + tl.arange(0, RIVALS)
        theirs = tl.load(best + j, mask=j < evens, other=float("-inf"))[None, :]
        ahead = (theirs > mine[:, None]) | ((theirs == mine[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum(ahead.to(tl.int32), axis=1)
    goes = is_even & (rank < count)

    even_index = _token(2 * i, cls_index, classes, IN_ORDER)
    odd = tl.load(partner + sample * evens + i, mask=goes, other=0)
    absorbing = _token(2 * odd + 1, cls_index, classes, IN_ORDER)
    tl.store(source + sample * count + rank, even_index, mask=goes)
    tl.store(target + sample * count + rank, absorbing, mask=goes)

    gone = tl.cumsum(goes.to(tl.int32), axis=0)
    odd_index = _token(2 * i + 1, cls_index, classes, IN_ORDER)
    if IN_ORDER:
        even_new = even_index - gone
        odd_new = odd_index - gone
        for c in range(classes):
            at = tl.load(cls_index + c).to(tl.int32)
            before = tl.sum((goes & (even_index < at)).to(tl.int32), axis=0)
            tl.store(keep + at - before, at)
    else:
        even_new = i - gone
        odd_new = evens - count + i
    tl.store(keep + even_new, even_index, mask=is_even & ~goes)
    tl.store(keep + odd_new, odd_index, mask=i < odds)


def select(
    x: Tensor, cls_index: Tensor, count: int, *, in_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the most similar pairs and the order of the kept tokens.

    Args:
        x: Features, (batch, length, dim), any strides.
        cls_index: (batch, k), int64.
        count: Pairs, at most the even tokens.
        in_order: Compare patches alone and keep indices ascending; otherwise mask class tokens and
            put odd indices after even ones.

    Returns:
        keep, (batch, length - count), source and target, (batch, count), int64.
    """
    (batch, length, dim), classes = x.shape, cls_index.shape[1]
    compared = length - classes if in_order else length
    evens = compared - compared // 2
    best = x.new_empty(batch, evens, dtype=torch.float32)
    partner = x.new_empty(batch, evens, dtype=torch.int32)
    keep, source, target = (
        x.new_empty(batch, n, dtype=torch.int64) for n in (length - count, count, count)
    )
    cls_index = cls_index.contiguous()
    with on_device(x):
        _best_partner_kernel[(batch * triton.cdiv(evens, TILE["EVENS"]),)](
            x, cls_index, best, partner, length, classes, dim, *x.stride(),
            IN_ORDER=in_order, **TILE, num_warps=TILE_WARPS, **OPTIONS,
        )  # fmt: skip
        _choose_kernel[(batch,)](
            best, partner, cls_index, keep, source, target, length, classes, count,
            IN_ORDER=in_order, **_ranks(evens), num_warps=RANK_WARPS, **OPTIONS,
        )  # fmt: skip
    return keep, source, target


def _ranks(evens: int) -> dict[str, int]:
    """Return the block sizes of a program that ranks that many tokens."""
    block = max(FEWEST, triton.next_power_of_2(evens))
    return dict(EVENS=block, RIVALS=max(1, RANKED // block))


def variants() -> Iterator[Variant]:
    """Yield the specializations for up to 785 tokens; the number of channels is free."""
    indices = dict.fromkeys(("cls_index", "keep", "source", "target"), "*i64")
    scores = {"best": "*fp32", "partner": "*i32"}
    for in_order in (False, True):
        way = "in_order" if in_order else "evens_then_odds"
        for dtype, pointer in POINTERS.items():
            numbers = ("length", "classes", "dim", "x_batch", "x_token", "x_channel")
            yield Variant(
                name=f"best_partner {str(dtype).removeprefix('torch.')} {way}",
                kernel=_best_partner_kernel,
                types={"x": pointer, **indices, **scores, **dict.fromkeys(numbers, "i32")},
                constants=dict(IN_ORDER=in_order, **TILE),
                warps=TILE_WARPS,
                aligned=("x", "cls_index", "best", "partner", "dim", "x_batch", "x_token"),
                ones=("x_channel",),
            )
        for evens in (64, 128, 256, 512):
            yield Variant(
                name=f"choose E{evens} {way}",
                kernel=_choose_kernel,
                types={**indices, **scores, **dict.fromkeys(("length", "classes", "count"), "i32")},
                constants=dict(IN_ORDER=in_order, **_ranks(evens)),
                warps=RANK_WARPS,
                aligned=(*indices, *scores),
            )
