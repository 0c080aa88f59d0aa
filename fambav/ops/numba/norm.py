"""Addition to the residual stream and RMS normalisation.

    total = residual + factor of the sample * hidden
    normed = total / sqrt(mean(total^2) + eps) * weight

A task has a few rows, each of which stays in the L1 cache between the two passes over it.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from fambav.ops.numba import lanes
from fambav.ops.numba.compilation import COUNTER, floats, inlined, kernel, launch, next_task
from fambav.ops.numba.functions import ONE, ZERO
from fambav.ops.numba.lanes import WIDTH, broadcast
from fambav.ops.numba.memory import get, put, read, vectors, write

ROWS = 16  # of a task
MOST_TASKS = 64  # of the backward pass, each with its part of the gradient of the weight


@inlined
def _factor_of(factor: Any, row: int, length: int) -> Any:
    return factor[0, 0, 0, row // length] if factor.size else ONE


@kernel(COUNTER, *(floats(4),) * 7, types.float32, types.int64)
def _norm_forward_kernel(
    counter: Any,
    hidden: Any,
    residual: Any,
    weight: Any,
    factor: Any,
    normed: Any,
    total: Any,
    scale: Any,
    eps: float,
    length: int,
) -> None:
    rows, dim = hidden.shape[2:]
    while True:
        first = next_task(counter) * ROWS
        if first >= rows:
            break
        for row in range(first, min(first + ROWS, rows)):
            share, squares = _factor_of(factor, row, length), broadcast(ZERO)
            for channel in range(0, dim, WIDTH):
                count = min(WIDTH, dim - channel)
                value = read(hidden, 0, 0, row, channel, count)
                if factor.size:
                    value = value * share
                if residual.size:
                    value = value + read(residual, 0, 0, row, channel, count)
                write(total, 0, 0, row, channel, count, value)
                squares = squares + value * value
            inverse = ONE / np.sqrt(lanes.total(squares) / np.float32(dim) + eps)
            scale[0, 0, 0, row] = inverse
            for channel in range(0, dim, WIDTH):
                count = min(WIDTH, dim - channel)
                value = read(total, 0, 0, row, channel, count) * inverse
                value = value * read(weight, 0, 0, 0, channel, count)
                write(normed, 0, 0, row, channel, count, value)


@kernel(COUNTER, *(floats(4),) * 9, types.int64, types.int64)
def _norm_backward_kernel(
    counter: Any,
    grad: Any,
    grad_total: Any,
    total: Any,
    weight: Any,
    scale: Any,
    factor: Any,
    dhidden: Any,
    dresidual: Any,
    parts: Any,
    length: int,
    stretch: int,
) -> None:
    rows, dim = total.shape[2:]
    blocks = -(-dim // WIDTH)
    dweight = vectors(blocks)
    while True:
        task = next_task(counter)
        if task * stretch >= rows:
            break
        for block in range(blocks):
            put(dweight, block, broadcast(ZERO))
        for row in range(task * stretch, min((task + 1) * stretch, rows)):
            share, inverse, along = _factor_of(factor, row, length), scale[0, 0, 0, row], ZERO
            products = broadcast(ZERO)
            for block in range(blocks):
                channel = block * WIDTH
                count = min(WIDTH, dim - channel)
                value = read(total, 0, 0, row, channel, count) * inverse
                product = read(grad, 0, 0, row, channel, count) * value
                put(dweight, block, get(dweight, block) + product)
                products = products + product * read(weight, 0, 0, 0, channel, count)
            along = lanes.total(products) / np.float32(dim)
            for channel in range(0, dim, WIDTH):
                count = min(WIDTH, dim - channel)
                value = read(total, 0, 0, row, channel, count) * inverse
                change = read(grad, 0, 0, row, channel, count)
                change = change * read(weight, 0, 0, 0, channel, count)
                change = (change - value * along) * inverse
                if grad_total.size:
                    change = change + read(grad_total, 0, 0, row, channel, count)
                if dresidual.size:
                    write(dresidual, 0, 0, row, channel, count, change)
                if factor.size:
                    change = change * share
                write(dhidden, 0, 0, row, channel, count, change)
        for block in range(blocks):
            count = min(WIDTH, dim - block * WIDTH)
            write(parts, 0, 0, task, block * WIDTH, count, get(dweight, block))


def add_rms_norm_forward(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    normed: Tensor,
    total: Tensor,
    *,
    eps: float,
    factor: Tensor | None = None,
) -> Tensor:
    """Add to the residual stream and normalise the sum.

    Tensors have any strides; those of another dtype than float32 are copied.

    Args:
        hidden: (rows, dim).
        residual: (rows, dim), or None for zeros.
        weight: (dim,).
        normed: Output for the result, (rows, dim).
        total: Output for the sum, (rows, dim), float32.
        eps: Added to the mean square.
        factor: Of hidden, (samples,), each of which has the same number of rows; None for 1.

    Returns:
        The scale of each row, (rows,), float32.
    """
    rows = len(hidden)
    scale = hidden.new_empty(rows, dtype=torch.float32)
    inputs = [_four_axes(x) for x in (hidden, residual, weight, factor)]
    outputs = [_four_axes(x) for x in (normed, total, scale)]
    launch(_norm_forward_kernel, -(-rows // ROWS), inputs, outputs, eps, _length(rows, factor))
    return scale


def add_rms_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    dhidden: Tensor,
    dresidual: Tensor | None,
    *,
    factor: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the weight; write that of the sum to both of its terms.

    Args:
        grad_normed: Gradient of the result, (rows, dim).
        grad_total: Gradient of the sum, (rows, dim), or None for zeros.
        total: The sum, (rows, dim).
        weight: (dim,).
        scale: As the forward pass returned it.
        dhidden: Output for the gradient of hidden, (rows, dim).
        dresidual: Output for that of the residual, (rows, dim), or None.
        factor: As in the forward pass.

    Returns:
        dweight, (dim,), float32; the order of its sum depends on shapes alone.
    """
    rows, dim = total.shape
    stretch = max(ROWS, -(-rows // MOST_TASKS))
    parts = total.new_empty(-(-rows // stretch), dim, dtype=torch.float32)
    inputs = [_four_axes(x) for x in (grad_normed, grad_total, total, weight, scale, factor)]
    outputs = [_four_axes(x) for x in (dhidden, dresidual, parts)]
    options = _length(rows, factor), stretch
    launch(_norm_backward_kernel, len(parts), inputs, outputs, *options)
    return parts.sum(dim=0)


def _four_axes(x: Tensor | None) -> Tensor | None:
    """Put axes of 1 in front."""
    return None if x is None else x[(None,) * (4 - x.dim())]


def _length(rows: int, factor: Tensor | None) -> int:
    """Return the rows of a sample."""
    return rows if factor is None else rows // len(factor)
