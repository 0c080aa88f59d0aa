"""Bipartite matching of tokens, given their products: a task is a sequence, which is sorted once.

Scores are the reference's to the bit, and so are all choices: a score that is no number is above
all others, and of equal ones the lower index wins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from torch import Tensor

from fambav.ops.numba.compilation import COUNTER, floats, indices, kernel, launch, next_task
from fambav.ops.numba.functions import ONE, ZERO
from fambav.ops.numba.lanes import WIDTH, broadcast, lane, total, where_less
from fambav.ops.numba.memory import get, read, vectors, write

_SMALLEST, _STEP = np.float32(1e-12), np.float32(WIDTH)
_LOWEST, _ENDLESS = np.float32(-np.inf), np.float32(np.inf)
_MOST = 2**31 - 1  # above the bits of every number
_LOW = 2**32 - 1  # bits of a key that hold the index


@kernel(COUNTER, floats(4), floats(4), indices(2), indices(2))
def _patches_kernel(counter: Any, x: Any, rows: Any, cls_index: Any, patches: Any) -> None:
    _, batch, length, dim = x.shape
    is_cls = np.empty(length, np.bool_)
    while True:
        b = next_task(counter)
        if b >= batch:
            break
        is_cls[:] = False
        for i in range(cls_index.shape[1]):
            if 0 <= cls_index[b, i] < length:
                is_cls[cls_index[b, i]] = True
        n = 0
        for t in range(length):
            if is_cls[t] or n == patches.shape[1]:
                continue
            patches[b, n] = t
            for channel in range(0, dim, WIDTH):
                count = min(WIDTH, dim - channel)
                write(rows, 0, b, n, channel, count, read(x, 0, b, t, channel, count))
            n += 1


@kernel(COUNTER, floats(4), floats(2), *(indices(2),) * 5, types.boolean)
def _choose_kernel(
    counter: Any,
    product: Any,
    norm: Any,
    patches: Any,
    masked: Any,
    keep: Any,
    source: Any,
    target: Any,
    in_order: bool,
) -> None:
    _, batch, evens, odds = product.shape
    count = source.shape[1]
    length = keep.shape[1] + count
    blocks = -(-odds // WIDTH)
    scale, paired = vectors(blocks), vectors(blocks)  # of odd tokens, 0 behind the last
    even_scale, best = np.empty(evens, np.float32), np.empty(evens, np.float32)
    bits, partner, keys = best.view(np.int32), np.empty(evens, np.int64), np.empty(evens, np.int64)
    lanes = vectors(1)
    for n in range(WIDTH):
        lanes[n] = n
    aside = np.empty(length, np.bool_)  # tokens that are not compared, then those that go
    while True:
        b = next_task(counter)
        if b >= batch:
            break
        aside[:] = False
        for i in range(masked.shape[1]):
            if 0 <= masked[b, i] < length:
                aside[masked[b, i]] = True
        scale[:], paired[:] = ZERO, ZERO
        for i in range(odds):
            size = norm[b, 2 * i + 1]
            scale[i] = ONE / (_SMALLEST if size < _SMALLEST else size)
            paired[i] = ZERO if masked.size and aside[2 * i + 1] else ONE
        for i in range(evens):
            size = norm[b, 2 * i]
            even_scale[i] = ONE / (_SMALLEST if size < _SMALLEST else size)

        for i in range(evens):
            own, top, at = even_scale[i], _LOWEST, 0
            if not (masked.size and aside[2 * i]):
                high, nearest, other = broadcast(_LOWEST), broadcast(ZERO), broadcast(ZERO)
                index = get(lanes, 0)
                for j in range(blocks):
                    last = min(WIDTH, odds - j * WIDTH)
                    score = read(product, 0, b, i, j * WIDTH, last) * own * get(scale, j)
                    score = where_less(get(paired, j), ONE, _LOWEST, score)
                    other = where_less(score, _ENDLESS, other, ONE)
                    nearest = where_less(high, score, index, nearest)
                    high = where_less(high, score, score, high)
                    index = index + _STEP
                if total(other) > ZERO:  # NaN, or infinity, which is below it
                    for j in range(odds):
                        value = product[0, b, i, j] * own * scale[j]
                        if paired[j] > ZERO and not value <= top:
                            top, at = value, j
                            if value != value:
                                break
                else:
                    for n in range(WIDTH):
                        value, j = lane(high, n), int(lane(nearest, n))
                        if value > top or (value == top and j < at):
                            top, at = value, j
            best[i], partner[i] = top, at

        for i in range(evens):
            order = np.int64(bits[i])  # of the same order as the numbers, if both are positive
            if best[i] != best[i]:
                order = _MOST
            elif best[i] == ZERO:
                order = 0
            elif order < 0:
                order ^= _MOST
            keys[i] = (-order << 32) + i
        keys.sort()
        aside[:] = False
        for n in range(count):
            i = keys[n] & _LOW
            even, odd = 2 * i, 2 * partner[i] + 1
            if patches.size:
                even, odd = patches[b, even], patches[b, odd]
            source[b, n], target[b, n] = even, odd
            aside[even] = True
        n, step = 0, 1 if in_order else 2
        for start in range(step):
            for t in range(start, length, step):
                if not aside[t]:
                    keep[b, n] = t
                    n += 1


def patches_of(x: Tensor, cls_index: Tensor) -> tuple[Tensor, Tensor]:
    """Leave class tokens out.

    Args:
        x: (batch, length, dim), float32, any strides.
        cls_index: Their indices, distinct, (batch, k), int64.

    Returns:
        The patches, (batch, length - k, dim), and their indices, (batch, length - k), int64.
    """
    batch, length, dim = x.shape
    patches = cls_index.new_empty(batch, length - cls_index.shape[1])
    rows = x.new_empty(*patches.shape, dim)
    arrays = cls_index.numpy(), patches.numpy()
    launch(_patches_kernel, batch, (x[None],), (rows[None],), *arrays)
    return rows, patches


def choose_pairs(
    product: Tensor,
    norm: Tensor,
    count: int,
    *,
    patches: Tensor,
    masked: Tensor,
    length: int,
    in_order: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the most similar pairs and the order of the kept tokens.

    Args:
        product: Of even and odd compared tokens, (batch, evens, odds), float32.
        norm: Of compared tokens, (batch, evens + odds), float32.
        count: Pairs, at most the even tokens.
        patches: Indices of the compared tokens, (batch, evens + odds), int64; empty if all are.
        masked: Tokens that are not paired, (batch, k), int64.
        length: Of the sequences.
        in_order: Keep indices ascending; otherwise put odd ones after even ones.

    Returns:
        keep, (batch, length - count), source and target, (batch, count), int64.
    """
    keep, source, target = (
        patches.new_empty(len(product), n) for n in (length - count, count, count)
    )
    given = (index.numpy() for index in (patches, masked, keep, source, target))
    launch(_choose_kernel, len(product), (product[None], norm), (), *given, in_order)
    return keep, source, target
