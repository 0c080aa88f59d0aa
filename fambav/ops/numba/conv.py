"""Depthwise convolution along the tokens in both directions, with silu.

A task has one vector of channels of one sample.  Its tokens are copied into a zero-padded buffer,
so that no step needs a bounds check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from fambav.ops.numba.backward_scan import sum_parts
from fambav.ops.numba.compilation import (
    COUNTER,
    floats,
    inlined,
    kernel,
    launch,
    next_task,
)
from fambav.ops.numba.forward_scan import per_channel
from fambav.ops.numba.functions import ZERO, sigmoid, silu_slope
from fambav.ops.numba.lanes import WIDTH, broadcast
from fambav.ops.numba.memory import get, put, read, vectors, write


@inlined
def _load(
    rows: Any, taps: Any, x: Any, weight: Any, bias: Any, b: int, channel: int, count: int
) -> None:
    """Copy the tokens with zero padding, and the taps of each direction followed by its bias."""
    directions, width, length = weight.shape[0], weight.shape[2], x.shape[2]
    for i in range(width - 1):
        put(rows, i, broadcast(ZERO))
        put(rows, width - 1 + length + i, broadcast(ZERO))
    for t in range(length):
        put(rows, width - 1 + t, read(x, 0, b, t, channel, count))
    for k in range(directions):
        for tap in range(width):
            put(taps, k * (width + 1) + tap, read(weight, k, 0, tap, channel, count))
        shift = read(bias, k, 0, 0, channel, count) if bias.size else broadcast(ZERO)
        put(taps, k * (width + 1) + width, shift)


@inlined
def _seen(tap: int, width: int, reverse: bool) -> int:
    """Return the row offset of the token that a tap multiplies."""
    return 2 * (width - 1) - tap if reverse else tap


@inlined
def _before_silu(
    rows: Any,
    taps: Any,
    t: int,
    k: int,
    width: int,
    reverse: bool,
) -> Any:
    out = get(taps, k * (width + 1) + width)
    for tap in range(width):
        row = get(rows, t + _seen(tap, width, reverse))
        out = out + get(taps, k * (width + 1) + tap) * row
    return out


@kernel(
    COUNTER,
    *(floats(4), floats(4), floats(4), floats(4)),
    *(types.boolean, types.boolean[::1]),
)
def _conv_forward_kernel(
    counter: Any,
    x: Any,
    weight: Any,
    bias: Any,
    u: Any,
    silu: bool,
    reverse: Any,
) -> None:
    directions, batch, length, dim = u.shape
    width = weight.shape[2]
    blocks = -(-dim // WIDTH)
    rows = vectors(length + 2 * (width - 1))
    taps = vectors(directions * (width + 1))
    while True:
        task = next_task(counter)
        if task >= batch * blocks:
            break
        b, channel = task // blocks, task % blocks * WIDTH
        count = min(WIDTH, dim - channel)
        _load(rows, taps, x, weight, bias, b, channel, count)
        for k in range(directions):
            for t in range(length):
                out = _before_silu(rows, taps, t, k, width, reverse[k])
                if silu:
                    out = out * sigmoid(out)
                write(u, k, b, t, channel, count, out)


@kernel(
    COUNTER,
    *(floats(4), floats(4), floats(4), floats(4), floats(4), floats(4)),
    *(types.boolean, types.boolean[::1]),
)
def _conv_backward_kernel(
    counter: Any,
    du: Any,
    x: Any,
    weight: Any,
    bias: Any,
    dx: Any,
    dparameters: Any,
    silu: bool,
    reverse: Any,
) -> None:
    directions, batch, length, dim = du.shape
    width = weight.shape[2]
    blocks = -(-dim // WIDTH)
    rows = vectors(length + 2 * (width - 1))
    dout = vectors(length + 2 * (width - 1))
    sums = vectors(length)
    taps = vectors(directions * (width + 1))
    dtaps = vectors(width + 1)
    while True:
        task = next_task(counter)
        if task >= batch * blocks:
            break
        b, channel = task // blocks, task % blocks * WIDTH
        count = min(WIDTH, dim - channel)
        _load(rows, taps, x, weight, bias, b, channel, count)
        for t in range(length):
            put(sums, t, broadcast(ZERO))
        for i in range(width - 1):
            put(dout, i, broadcast(ZERO))
            put(dout, width - 1 + length + i, broadcast(ZERO))

        for k in range(directions):
            for tap in range(width + 1):
                put(dtaps, tap, broadcast(ZERO))
            for t in range(length):
                change = read(du, k, b, t, channel, count)
                if silu:
                    before = _before_silu(rows, taps, t, k, width, reverse[k])
                    change = change * silu_slope(before, sigmoid(before))
                put(dout, width - 1 + t, change)
                put(dtaps, width, get(dtaps, width) + change)
                for tap in range(width):
                    row = get(rows, t + _seen(tap, width, reverse[k]))
                    put(dtaps, tap, get(dtaps, tap) + change * row)
            for t in range(length):
                out = get(sums, t)
                for tap in range(width):
                    row = get(dout, t + _seen(tap, width, not reverse[k]))
                    out = out + get(taps, k * (width + 1) + tap) * row
                put(sums, t, out)
            for tap in range(width + 1):
                write(dparameters, b, k, tap, channel, count, get(dtaps, tap))
        for t in range(length):
            write(dx, 0, b, t, channel, count, get(sums, t))


def conv_forward(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    u: Tensor,
    *,
    silu: bool,
    reverse: Sequence[bool],
) -> None:
    """Convolve each channel along the tokens, in each direction with its own taps.

    Tensors have any strides; those of another dtype than float32 are copied.

    Args:
        x: Input, (batch, length, dim).
        weight: Taps of each direction, (dim, width); the last one multiplies the present token.
        bias: Added in each direction, (dim,).
        u: Output for the result, (directions, batch, length, dim).
        silu: Whether silu follows.
        reverse: Of each direction, whether it convolves over following tokens.
    """
    _, batch, _, dim = u.shape
    launch(
        _conv_forward_kernel,
        batch * -(-dim // WIDTH),
        (x[None], per_channel(weight), per_channel(bias)),
        (u,),
        silu,
        np.array(reverse, dtype=np.bool_),
    )


def conv_backward(
    du: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    dx: Tensor,
    *,
    silu: bool,
    reverse: Sequence[bool],
) -> tuple[Tensor, Tensor | None]:
    """Write the gradient of x, the sum over directions; return those of the parameters.

    Args:
        du: Gradient of u, (directions, batch, length, dim).
        x: As in `conv_forward`.
        weight: As in `conv_forward`.
        bias: As in `conv_forward`.
        dx: Output for the gradient of x, (batch, length, dim).
        silu: As in `conv_forward`.
        reverse: As in `conv_forward`.

    Returns:
        The gradients of the taps, (directions, dim, width), and of bias, (directions, dim) or None.
    """
    directions, batch, _, dim = du.shape
    width = weight[0].shape[1]
    dparameters = du.new_empty(batch, directions, width + 1, dim, dtype=torch.float32)
    launch(
        _conv_backward_kernel,
        batch * -(-dim // WIDTH),
        (du, x[None], per_channel(weight), per_channel(bias)),
        (dx[None], dparameters),
        silu,
        np.array(reverse, dtype=np.bool_),
    )
    sums = sum_parts(dparameters, torch.empty_like(dparameters[0]))
    return sums[:, :width].mT.contiguous(), None if bias is None else sums[:, width].clone()
