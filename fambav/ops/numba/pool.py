"""Weighted means of groups of tokens: one launch for both streams each way.

A task is a sequence.  Sources are added in the order of their list, each product rounded before,
as the reference does: means, sums of sizes and gradients equal its own to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fambav.ops.numba.compilation import (
    COUNTER,
    floats,
    indices,
    inlined,
    kernel,
    launch,
    next_task,
)
from fambav.ops.numba.lanes import WIDTH, rounded_product
from fambav.ops.numba.memory import read, write

TOKENS = 16  # in a task of the backward pass


@inlined
def _share(x: Any, out: Any, b: int, row: int, place: int, share: Any, add: bool) -> None:
    """Write the share of a row to a place, or add it to what is there."""
    dim = x.shape[3]
    for channel in range(0, dim, WIDTH):
        count = min(WIDTH, dim - channel)
        value = rounded_product(read(x, 0, b, row, channel, count), share)
        if add:
            value = read(out, 0, b, place, channel, count) + value
        write(out, 0, b, place, channel, count, value)


@inlined
def _inside(index: int, length: int) -> bool:
    return 0 <= index < length


@kernel(COUNTER, *(floats(4),) * 2, *(floats(2),) * 2, *(floats(4),) * 2, *(floats(2),) * 2,
        *(indices(2),) * 4, COUNTER)  # fmt: skip
def _pool_forward_kernel(
    counter: Any,
    x: Any,
    residual: Any,
    weight: Any,
    size: Any,
    mean: Any,
    residual_mean: Any,
    sums: Any,
    share: Any,
    keep: Any,
    source: Any,
    target: Any,
    place: Any,
    left_out: Any,
) -> None:
    batch, length = place.shape
    kept, count = keep.shape[1], source.shape[1]
    total, into = np.empty(kept, np.float32), np.empty(count, np.int64)
    while True:
        b = next_task(counter)
        if b >= batch:
            break
        for t in range(length):
            place[b, t] = -1
        for k in range(kept):
            t = keep[b, k]
            if _inside(t, length):
                place[b, t], total[k], sums[b, k] = k, weight[b, t], size[b, t]
        for i in range(count):
            t = target[b, i]
            into[i] = place[b, t] if _inside(t, length) else -1
        for i in range(count):
            t, k = source[b, i], into[i]
            if _inside(t, length) and k >= 0:
                place[b, t] = k
                total[k] += weight[b, t]
                sums[b, k] += size[b, t]
        whole = True
        for t in range(length):
            k = place[b, t]
            if k < 0:
                whole = False
            else:
                share[b, t] = weight[b, t] / total[k]
        if not whole:  # an index is out of range, or comes twice
            left_out[0] = 1
            continue

        for k in range(kept):
            t = keep[b, k]
            _share(x, mean, b, t, k, share[b, t], add=False)
            if residual.size:
                _share(residual, residual_mean, b, t, k, share[b, t], add=False)
        for i in range(count):
            t, k = source[b, i], into[i]
            _share(x, mean, b, t, k, share[b, t], add=True)
            if residual.size:
                _share(residual, residual_mean, b, t, k, share[b, t], add=True)


@kernel(COUNTER, *(floats(4),) * 2, floats(2), *(floats(4),) * 2, indices(2))
def _pool_backward_kernel(
    counter: Any, first: Any, second: Any, share: Any, first_out: Any, second_out: Any, place: Any
) -> None:
    batch, length = place.shape
    pieces = -(-length // TOKENS)
    while True:
        task = next_task(counter)
        if task >= batch * pieces:
            break
        b, start = task // pieces, task % pieces * TOKENS
        for t in range(start, min(start + TOKENS, length)):
            _share(first, first_out, b, place[b, t], t, share[b, t], add=False)
            if second.size:
                _share(second, second_out, b, place[b, t], t, share[b, t], add=False)


def pool_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    size: Tensor,
    keep: Tensor,
    source: Tensor,
    target: Tensor,
) -> tuple[Tensor, ...]:
    """Average both streams over groups of tokens; arguments and results as of Triton's.

    Streams are float32, and all tensors have any strides.

    Raises:
        ValueError: If a token is in no group.
    """
    (batch, length, dim), kept = x.shape, keep.shape[1]
    mean = x.new_empty(batch, kept, dim)
    other = x.new_empty(0) if residual is None else x.new_empty(batch, kept, dim)
    sums, share = size.new_empty(batch, kept), size.new_empty(batch, length)
    place, left_out = keep.new_empty(batch, length), np.zeros(1, np.int64)
    second = (None, None) if residual is None else (residual[None], other[None])
    launch(
        _pool_forward_kernel,
        batch,
        (x[None], second[0], weight, size),
        (mean[None], second[1], sums, share),
        *(index.numpy() for index in (keep, source, target, place)),
        left_out,
    )
    if left_out[0]:
        raise ValueError("selection has a token in no group, expected every token in one")
    return mean, other, sums, share, place


def pool_backward(grads: list[Tensor], share: Tensor, place: Tensor) -> list[Tensor]:
    """Return the gradients of one or two streams; arguments as of Triton's, float32."""
    (batch, length), dim = share.shape, grads[0].shape[2]
    out = [grad.new_empty(batch, length, dim) for grad in grads]
    tasks = batch * -(-length // TOKENS)
    first, second = ([x[None] for x in xs] + [None] * (2 - len(xs)) for xs in (grads, out))
    launch(_pool_backward_kernel, tasks, (*first, share), second, place.numpy())
    return out
