"""Selective scan forward: a task loops over all tokens with the state of one vector of channels.

Source: the recurrence of Gu and Dao, "Mamba", arXiv:2312.00752, algorithm 2, and the recomputation
of its section 3.3.2, here from the states kept between chunks of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from fambav.ops.kept_states import NUMBA_CHUNK as CHUNK
from fambav.ops.kept_states import numba_shape
from fambav.ops.numba import functions
from fambav.ops.numba.compilation import COUNTER, floats, kernel, launch, next_task
from fambav.ops.numba.functions import LOG2_E, ZERO, exp2
from fambav.ops.numba.lanes import WIDTH, broadcast
from fambav.ops.numba.memory import get, number_at, put, read, vectors, write


@kernel(
    COUNTER,
    *(floats(4), floats(4), floats(4), floats(5), floats(5), floats(4), floats(4)),
    *(floats(4), floats(4), floats(4), types.boolean, types.boolean[::1]),
)
def _scan_forward_kernel(
    counter: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    bias: Any,
    y: Any,
    last: Any,
    kept: Any,
    softplus: bool,
    reverse: Any,
) -> None:
    directions, batch, length, dim = u.shape
    groups, state = B.shape[3:]
    width = dim // groups
    blocks = -(-width // WIDTH)
    A_log2e, h = vectors(state), vectors(state)
    while True:
        task = next_task(counter)
        if task >= directions * batch * groups * blocks:
            break
        block, group = task % blocks, task // blocks % groups
        b, k = task // (blocks * groups) % batch, task // (blocks * groups * batch)
        channel = group * width + block * WIDTH
        count = min(WIDTH, width - block * WIDTH)

        shift = read(bias, k, 0, 0, channel, count) if bias.size else broadcast(ZERO)
        skip = read(D, k, 0, 0, channel, count) if D.size else broadcast(ZERO)
        for n in range(state):
            put(A_log2e, n, read(A, k, 0, n, channel, count) * LOG2_E)
            put(h, n, broadcast(ZERO))

        for step in range(length):
            if kept.size and step % CHUNK == 0:
                for n in range(state):
                    write(kept, k, b, step // CHUNK * state + n, channel, count, get(h, n))
            t = length - 1 - step if reverse[k] else step
            u_t = read(u, k, b, t, channel, count)
            delta_t = read(delta, k, b, t, channel, count) + shift
            if softplus:
                delta_t = functions.softplus(delta_t)[0]
            x = delta_t * u_t
            out = skip * u_t if D.size else broadcast(ZERO)
            for n in range(state):
                decay = exp2(delta_t * get(A_log2e, n))
                h_n = decay * get(h, n) + x * number_at(B, k, b, t, group, n)
                put(h, n, h_n)
                out = out + h_n * number_at(C, k, b, t, group, n)
            write(y, k, b, t, channel, count, out)

        for n in range(state):
            write(last, k, b, n, channel, count, get(h, n))


def per_channel(parameters: Sequence[Tensor] | None) -> Tensor | None:
    """Stack a parameter of each direction, channels last.

    Args:
        parameters: For each direction (dim,) or (dim, n); or None.

    Returns:
        (directions, 1, n or 1, dim), or None for None.
    """
    if parameters is None:
        return None
    return torch.stack([x.T if x.dim() == 2 else x[None] for x in parameters])[:, None]


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Sequence[Tensor],
    B: Tensor,
    C: Tensor,
    D: Sequence[Tensor] | None,
    bias: Sequence[Tensor] | None,
    y: Tensor,
    *,
    softplus: bool,
    reverse: Sequence[bool],
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Scan along the tokens in one or two directions.

    Tensors have any strides; those of another dtype than float32 are copied.

    Args:
        u: Input, (directions, batch, length, dim).
        delta: Step size before bias and softplus, shaped like u.
        A: Decay rate of each direction, (dim, state).
        B: Input matrix, (directions, batch, length, groups, state).
        C: Output matrix, shaped like B.
        D: Skip weight of each direction, (dim,).
        bias: Added to delta in each direction, (dim,).
        y: Output for the result, shaped like u.
        softplus: Whether delta goes through softplus.
        reverse: For each direction, whether it goes from the last token to the first.
        keep: Whether to keep the states that `scan_backward` needs.

    Returns:
        The state after the last step, (directions, batch, dim, state), and the states before each
        chunk, of shape `kept_states.numba_shape`, or empty.
    """
    directions, batch, length, dim = u.shape
    groups, state = B.shape[3:]
    last = u.new_empty(directions, batch, dim, state, dtype=torch.float32)
    shape = numba_shape(directions, batch, length, dim, state)
    kept = u.new_empty(shape, dtype=torch.float32) if keep else None
    launch(
        _scan_forward_kernel,
        directions * batch * groups * -(-dim // groups // WIDTH),
        (u, delta, per_channel(A), B, C, per_channel(D), per_channel(bias)),
        (y, last.mT, kept),
        softplus,
        np.array(reverse, dtype=np.bool_),
    )
    return last, last.new_empty(0) if kept is None else kept
