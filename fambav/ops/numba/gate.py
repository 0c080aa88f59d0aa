"""The gate at the end of a Mamba block: the sum of the directions times silu."""

from __future__ import annotations

from typing import Any

from numba import types
from torch import Tensor

from fambav.ops.numba.compilation import COUNTER, floats, kernel, launch, next_task
from fambav.ops.numba.functions import ZERO, sigmoid, silu_slope
from fambav.ops.numba.lanes import WIDTH, broadcast, largest, total
from fambav.ops.numba.memory import get, put, read, vectors, write

TOKENS = 16  # in a task


@kernel(COUNTER, *(floats(4),) * 5, types.float32, types.boolean, types.boolean)
def _gate_forward_kernel(
    counter: Any,
    y: Any,
    z: Any,
    out: Any,
    summed: Any,
    score: Any,
    scale: float,
    gated: bool,
    clipped: bool,
) -> None:
    directions, batch, length, dim = y.shape
    pieces = -(-length // TOKENS)
    scores = vectors(directions)
    while True:
        task = next_task(counter)
        if task >= batch * pieces:
            break
        b, first = task // pieces, task % pieces * TOKENS
        for t in range(first, min(first + TOKENS, length)):
            for k in range(directions):
                put(scores, k, broadcast(ZERO))
            for channel in range(0, dim, WIDTH):
                count = min(WIDTH, dim - channel)
                y_t, z_t = broadcast(ZERO), read(z, 0, b, t, channel, count)
                s = sigmoid(z_t)
                for k in range(directions):
                    y_k = read(y, k, b, t, channel, count)
                    y_t = y_t + y_k
                    if score.size:
                        if gated:
                            y_k = y_k * z_t * s
                        if clipped:
                            y_k = largest(y_k, ZERO)
                        put(scores, k, get(scores, k) + y_k)
                if summed.size:
                    write(summed, 0, b, t, channel, count, y_t)
                write(out, 0, b, t, channel, count, y_t * z_t * s * scale)
            if score.size:
                for k in range(directions):
                    score[k, b, t, 0] = total(get(scores, k))


@kernel(COUNTER, *(floats(4),) * 6, types.float32)
def _gate_backward_kernel(
    counter: Any, grad: Any, summed: Any, z: Any, dy: Any, dz: Any, out: Any, scale: float
) -> None:
    _, batch, length, dim = grad.shape
    pieces = -(-length // TOKENS)
    while True:
        task = next_task(counter)
        if task >= batch * pieces:
            break
        b, first = task // pieces, task % pieces * TOKENS
        for t in range(first, min(first + TOKENS, length)):
            for channel in range(0, dim, WIDTH):
                count = min(WIDTH, dim - channel)
                change = read(grad, 0, b, t, channel, count) * scale
                z_t = read(z, 0, b, t, channel, count)
                s = sigmoid(z_t)
                sum_t = read(summed, 0, b, t, channel, count)
                write(dy, 0, b, t, channel, count, change * z_t * s)
                write(dz, 0, b, t, channel, count, change * sum_t * silu_slope(z_t, s))
                if out.size:
                    write(out, 0, b, t, channel, count, sum_t * z_t * s * scale)


def gate_forward(
    y: Tensor,
    z: Tensor,
    out: Tensor,
    total: Tensor | None,
    *,
    scale: float,
    score: Tensor | None = None,
    gated: bool = True,
    clipped: bool = True,
) -> None:
    """Write scale * silu(z) * the sum of y over the directions.

    Tensors have any strides; those of another dtype than float32 are copied.

    Args:
        y: (directions, batch, length, dim).
        z: The gate, (batch, length, dim).
        out: Output for the result, (batch, length, dim).
        total: Output for the sum, which `gate_backward` needs, (batch, length, dim), or None.
        scale: Factor of the result.
        score: Output for the sum over the channels of each token in each direction, float32,
            (directions, batch, length), or None.
        gated: Whether the terms of that sum are y silu(z), or y.
        clipped: Whether negative terms are left out of it.
    """
    tasks = z.shape[0] * -(-z.shape[1] // TOKENS)
    sums = (None if total is None else total[None], None if score is None else score[..., None])
    launch(_gate_forward_kernel, tasks, (y, z[None]), (out[None], *sums), scale, gated, clipped)


def gate_backward(
    grad: Tensor,
    total: Tensor,
    z: Tensor,
    dy: Tensor,
    dz: Tensor,
    out: Tensor | None = None,
    *,
    scale: float,
) -> None:
    """Write the gradients of y, the same for each direction, and of z.

    Args:
        grad: Gradient of the result, (batch, length, dim).
        total: As written by `gate_forward`.
        z: As in `gate_forward`.
        dy: Output for the gradient of y, (batch, length, dim).
        dz: Output for the gradient of z, (batch, length, dim).
        out: Output for the recomputed result, (batch, length, dim), or None.
        scale: As in `gate_forward`.
    """
    tasks = z.shape[0] * -(-z.shape[1] // TOKENS)
    inputs = [x[None] for x in (grad, total, z)]
    outputs = (dy[None], dz[None], None if out is None else out[None])
    launch(_gate_backward_kernel, tasks, inputs, outputs, scale)
