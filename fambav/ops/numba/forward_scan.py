"""Selective scan forward: a task loops over all tokens with the state of one vector of channels.

The step sizes of tokens that were removed in front of a token add to its own in the decay alone:

    h[t] = exp((delta[t] + gap[t]) A) h[t-1] + delta[t] B[t] u[t]

An order table says which token a group comes to at each step: it is read there by its index, and
nothing is moved in memory.

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
from fambav.ops.numba.compilation import (
    COUNTER,
    floats,
    indices,
    inlined,
    kernel,
    launch,
    next_task,
)
from fambav.ops.numba.functions import LOG2_E, ZERO, exp2, exp2_of_four
from fambav.ops.numba.lanes import WIDTH, broadcast
from fambav.ops.numba.memory import fetch, get, number_at, put, read, vectors, write

NONE, BIAS, SELF, HOLD_PREV, CACHED = range(5)
GAPS = {"none": NONE, "bias": BIAS, "self": SELF, "hold_prev": HOLD_PREV, "cached": CACHED}
AHEAD = 8  # steps before a token is needed that it is fetched
ORDER = indices(3)
_NO_ORDER = np.empty((0, 0, 0), np.int64)


@inlined
def walk_of(order: Any, length: int, b: int, group: int, reverse: bool, by_token: bool) -> Any:
    """Return how a group walks the tokens of a sample, and in how many steps."""
    steps = order.shape[1] if order.size else length
    return order, steps, b if len(order) > 1 else 0, group, reverse, by_token


@inlined
def token_at(walk: Any, step: int) -> Any:
    """Return the index of u and y at a step, and that of delta, B and C."""
    order, steps, b, group, reverse, by_token = walk
    place = steps - 1 - step if reverse else step
    if order.size == 0:
        return place, place
    token = order[b, place, group]
    return token, token if by_token else place


@inlined
def shared_before(u: Any, delta: Any, dim: int, first: int) -> Any:
    """Return by how much the channels of a group lie further in front in u and in delta.

    All groups may have the same channels there; `first` is the first one of the group.
    """
    return first if u.shape[3] < dim else 0, first if delta.shape[3] < dim else 0


@inlined
def gap_of(
    policy: int, skipped: Any, skipped_dt: Any, place: Any, t: int, delta_t: Any, rest: Any
) -> Any:
    """Return the step sizes of what was removed in front of the token t.

    `rest` is the step size of each under the policies BIAS and HOLD_PREV.
    """
    k, b, channel, count = place
    if policy == CACHED:
        return read(skipped_dt, k, b, t, channel, count)
    if policy == SELF:
        return delta_t * skipped[k, b, t, 0]
    return rest * skipped[k, b, t, 0]


@inlined
def _advance(
    h: Any, A_log2e: Any, B: Any, C: Any, place: Any, state: int, aged: Any, x: Any, out: Any
) -> Any:
    """Update the state by a token; return the sum of its output and `out`.

    Four elements at once: the steps of one exponential wait for each other.
    """
    k, b, t, group = place
    fours = state - state % 4
    for n in range(0, fours, 4):
        a0, a1 = aged * get(A_log2e, n), aged * get(A_log2e, n + 1)
        a2, a3 = aged * get(A_log2e, n + 2), aged * get(A_log2e, n + 3)
        a0, a1, a2, a3 = exp2_of_four(a0, a1, a2, a3)
        h0 = a0 * get(h, n) + x * number_at(B, k, b, t, group, n)
        h1 = a1 * get(h, n + 1) + x * number_at(B, k, b, t, group, n + 1)
        h2 = a2 * get(h, n + 2) + x * number_at(B, k, b, t, group, n + 2)
        h3 = a3 * get(h, n + 3) + x * number_at(B, k, b, t, group, n + 3)
        put(h, n, h0)
        put(h, n + 1, h1)
        put(h, n + 2, h2)
        put(h, n + 3, h3)
        out = out + h0 * number_at(C, k, b, t, group, n)
        out = out + h1 * number_at(C, k, b, t, group, n + 1)
        out = out + h2 * number_at(C, k, b, t, group, n + 2)
        out = out + h3 * number_at(C, k, b, t, group, n + 3)
    for n in range(fours, state):
        h_n = exp2(aged * get(A_log2e, n)) * get(h, n) + x * number_at(B, k, b, t, group, n)
        put(h, n, h_n)
        out = out + h_n * number_at(C, k, b, t, group, n)
    return out


@inlined
def _step_size(delta: Any, place: Any, t: int, at_delta: int, shift: Any, softplus: bool) -> Any:
    k, b, _, count = place
    delta_t = read(delta, k, b, t, at_delta, count) + shift
    return functions.softplus(delta_t)[0] if softplus else delta_t


@kernel(
    COUNTER,
    *(floats(4), floats(4), floats(4), floats(5), floats(5), floats(4), floats(4)),
    *(floats(4), floats(4), floats(4), floats(4), floats(4), floats(4)),
    *(types.boolean, types.boolean[::1], types.int64, ORDER, types.boolean),
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
    skipped: Any,
    skipped_dt: Any,
    y: Any,
    last: Any,
    kept: Any,
    dt: Any,
    softplus: bool,
    reverse: Any,
    policy: int,
    order: Any,
    by_token: bool,
) -> None:
    directions, batch, length, _ = u.shape
    groups, state = B.shape[3:]
    dim = A.shape[3]
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
        place = (k, b, channel, count)
        walk = walk_of(order, length, b, group, reverse[k], by_token)
        before_u, before_delta = shared_before(u, delta, dim, group * width)
        at_u, at_delta = channel - before_u, channel - before_delta

        shift = read(bias, k, 0, 0, channel, count) if bias.size else broadcast(ZERO)
        rest = functions.softplus(shift)[0] if softplus else shift
        skip = read(D, k, 0, 0, channel, count) if D.size else broadcast(ZERO)
        for n in range(state):
            put(A_log2e, n, read(A, k, 0, n, channel, count) * LOG2_E)
            put(h, n, broadcast(ZERO))

        # That of the next step, so that its chain of operations runs beside those of a whole token.
        following = _step_size(delta, place, token_at(walk, 0)[1], at_delta, shift, softplus)
        for step in range(walk[1]):
            if kept.size and step % CHUNK == 0:
                for n in range(state):
                    write(kept, k, b, step // CHUNK * state + n, channel, count, get(h, n))
            token, t = token_at(walk, min(step + AHEAD, walk[1] - 1))
            fetch(u, k, b, token, at_u)
            fetch(delta, k, b, t, at_delta)
            fetch(y, k, b, token, channel)
            token, t = token_at(walk, step)
            u_t = read(u, k, b, token, at_u, count)
            delta_t, later = following, token_at(walk, min(step + 1, walk[1] - 1))[1]
            following = _step_size(delta, place, later, at_delta, shift, softplus)
            if dt.size:
                write(dt, k, b, t, channel, count, delta_t)
            x = delta_t * u_t
            aged = delta_t
            if policy != NONE:
                aged = delta_t + gap_of(policy, skipped, skipped_dt, place, t, delta_t, rest)
                if policy == HOLD_PREV:
                    rest = delta_t
            out = skip * u_t if D.size else broadcast(ZERO)
            out = _advance(h, A_log2e, B, C, (k, b, t, group), state, aged, x, out)
            write(y, k, b, token, channel, count, out)

        for n in range(state):
            write(last, k, b, n, channel, count, get(h, n))


def per_channel(parameters: Sequence[Tensor] | None) -> Tensor | None:
    """Stack a parameter of each direction, channels last.

    Args:
        parameters: For each direction (dim,) or (dim, n); a tensor of these is not copied if
            its channels are neighbours; or None.

    Returns:
        (directions, 1, n or 1, dim), or None for None.
    """
    if parameters is None:
        return None
    if isinstance(parameters, Tensor) and parameters.dim() == 3 and parameters.mT.is_contiguous():
        return parameters.mT[:, None]
    return torch.stack([x.T if x.dim() == 2 else x[None] for x in parameters])[:, None]


def order_array(order: Tensor | None) -> Any:
    """Return a table as the kernels take it, (batch or 1, steps, groups), or an empty one."""
    if order is None:
        return _NO_ORDER
    return (order if order.dim() == 3 else order[None]).numpy()


def _kept(y: Tensor, state: int, order: Tensor | None) -> Tensor:
    directions, batch, length, dim = y.shape
    steps = length if order is None else order.shape[-2]
    return y.new_empty(numba_shape(directions, batch, steps, dim, state), dtype=torch.float32)


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
    skipped: Tensor | None = None,
    skipped_dt: Tensor | None = None,
    gap_policy: str = "none",
    dt: Tensor | None = None,
    order: Tensor | None = None,
    order_params: bool = True,
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
        skipped: Number of tokens removed in front of each, (directions, batch, length).
        skipped_dt: Their step sizes, summed, shaped like u, under "cached".
        gap_policy: How the state ages over them, see `registry.GAP_POLICIES`.
        dt: Output for the step size after bias and softplus, shaped like u, or None.
        order, order_params: As in `selective_scan`; nothing is written where no group comes.

    Returns:
        The state after the last step, (directions, batch, dim, state), and the states before each
        chunk, of shape `kept_states.numba_shape`, or empty.
    """
    directions, batch, _, dim = y.shape
    groups, state = B.shape[3:]
    last = y.new_empty(directions, batch, dim, state, dtype=torch.float32)
    kept = _kept(y, state, order) if keep else None
    gap = None if skipped is None else skipped[..., None], skipped_dt
    launch(
        _scan_forward_kernel,
        directions * batch * groups * -(-dim // groups // WIDTH),
        (u, delta, per_channel(A), B, C, per_channel(D), per_channel(bias), *gap),
        (y, last.mT, kept, dt),
        *(softplus, np.array(reverse, dtype=np.bool_), GAPS[gap_policy]),
        *(order_array(order), order_params),
    )
    return last, last.new_empty(0) if kept is None else kept
