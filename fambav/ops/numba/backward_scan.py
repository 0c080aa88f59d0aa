"""Selective scan backward: a task goes back along all tokens with a few vectors of channels.

Each chunk of tokens is rescanned from its kept state, one element of the state after the other, so
that a pass over the chunk stays in the L1 cache.  The values of a token are one row of the work
buffer, because a loop over many buffers runs out of registers for their addresses.

Source: as `forward_scan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from fambav.ops.kept_states import NUMBA_CHUNK as CHUNK
from fambav.ops.numba import functions
from fambav.ops.numba.compilation import (
    COUNTER,
    floats,
    inlined,
    kernel,
    launch,
    next_task,
)
from fambav.ops.numba.forward_scan import (
    AHEAD,
    BIAS,
    GAPS,
    HOLD_PREV,
    NONE,
    ORDER,
    SELF,
    gap_of,
    order_array,
    per_channel,
    shared_before,
    token_at,
    walk_of,
)
from fambav.ops.numba.functions import LN_2, LOG2_E, ONE, ZERO, exp2
from fambav.ops.numba.lanes import WIDTH, broadcast, total
from fambav.ops.numba.memory import fetch, get, number, put, read, vectors, write

MOST_BLOCKS = 8  # vectors of channels of a task
ENOUGH_TASKS = 16  # for threads to share a small batch

# The columns of a row of the work buffer.  AGED is the step size of the decay, DELTA that of the
# input.  DX and DAGED are sums over the state.
DELTA, SLOPE, X, DY, DX, DAGED, DECAY, DECAYED, AGED = range(9)
ROW = 9


@inlined
def _ahead(tokens: Any, i: int) -> Any:
    """Return what is needed a few steps after step i of a chunk, maybe by the next vector.

    Returns:
        The indices of u and of delta at that step, and how many channels that vector is behind.
    """
    seen, at, steps, _ = tokens
    later = i + AHEAD
    if later < steps:
        return seen[later], at[later], 0
    later = min(later - steps, steps - 1)
    return seen[later], at[later], WIDTH


@inlined
def _load_chunk(
    work: Any, u: Any, delta: Any, dy: Any, shift: Any, place: Any, tokens: Any, softplus: Any,
    gap: Any,
) -> None:  # fmt: skip
    """Fill the work buffer from the inputs."""
    k, b, channel, count, at_u, at_delta = place
    seen, at, steps, before = tokens
    policy, skipped, skipped_dt = gap
    rest = shift
    if policy == HOLD_PREV and before >= 0:
        rest = read(delta, k, b, before, at_delta, count) + shift
    if softplus:
        rest = functions.softplus(rest)[0]
    for i in range(steps):
        token, t, more = _ahead(tokens, i)
        fetch(u, k, b, token, at_u + more)
        fetch(delta, k, b, t, at_delta + more)
        fetch(dy, k, b, token, channel + more)
        token, t, row = seen[i], at[i], i * ROW
        delta_t = read(delta, k, b, t, at_delta, count) + shift
        if softplus:
            delta_t, slope = functions.softplus(delta_t)
            put(work, row + SLOPE, slope)
        put(work, row + DELTA, delta_t)
        aged = delta_t
        if policy != NONE:
            aged = delta_t + gap_of(policy, skipped, skipped_dt, place[:4], t, delta_t, rest)
            if policy == HOLD_PREV:
                rest = delta_t
        put(work, row + AGED, aged)
        put(work, row + X, delta_t * read(u, k, b, token, at_u, count))
        put(work, row + DY, read(dy, k, b, token, channel, count))
        put(work, row + DX, broadcast(ZERO))
        put(work, row + DAGED, broadcast(ZERO))


@inlined
def _scan_again(
    work: Any, sums: Any, weights: Any, first: int, steps: int, rate: Any, h: Any
) -> None:
    """Scan one element of the state along a chunk; accumulate the gradient of C."""
    for i in range(steps):
        row, pair = i * ROW, 2 * (first + i)
        decay = exp2(get(work, row + AGED) * rate)
        decayed = decay * h
        put(work, row + DECAY, decay)
        put(work, row + DECAYED, decayed)
        h = decayed + get(work, row + X) * number(weights, pair)
        put(sums, pair + 1, get(sums, pair + 1) + get(work, row + DY) * h)


@inlined
def _scan_back(
    work: Any, sums: Any, weights: Any, first: int, steps: int, rate: Any, dh: Any, dA: Any
) -> Any:
    """Backpropagate one element of the state along a chunk; accumulate the gradient of B."""
    for i in range(steps - 1, -1, -1):
        row, pair = i * ROW, 2 * (first + i)
        dh = dh + get(work, row + DY) * number(weights, pair + 1)
        put(sums, pair, get(sums, pair) + dh * get(work, row + X))
        put(work, row + DX, get(work, row + DX) + dh * number(weights, pair))
        dexponent = dh * get(work, row + DECAYED)
        put(work, row + DAGED, get(work, row + DAGED) + dexponent * rate)
        dA = dA + dexponent * get(work, row + AGED)
        dh = dh * get(work, row + DECAY)
    return dh, dA


@inlined
def _gap_gradient(
    work: Any, i: int, place: Any, tokens: Any, gap: Any, later: Any, dskipped_dt: Any
) -> tuple[Any, Any]:
    """Return what the gap of a token adds to the gradients of its delta, and of all of BIAS.

    `later` is what the gap behind the chunk adds to its last token under HOLD_PREV.
    """
    k, b, channel, count, _, _ = place
    _, at, steps, _ = tokens
    policy, skipped, _ = gap
    t, none = at[i], broadcast(ZERO)
    daged = get(work, i * ROW + DAGED) * LN_2
    if policy == SELF:
        return daged * skipped[k, b, t, 0], none
    if policy == BIAS:
        return none, daged * skipped[k, b, t, 0]
    if policy == HOLD_PREV:
        if i == steps - 1:
            return later, none
        return get(work, (i + 1) * ROW + DAGED) * LN_2 * skipped[k, b, at[i + 1], 0], none
    write(dskipped_dt, k, b, t, channel, count, daged)
    return none, none


@inlined
def _store_chunk(
    work: Any, u: Any, skip: Any, place: Any, tokens: Any, softplus: Any,
    gap: Any, later: Any, ddt: Any, du: Any, ddelta: Any, dskipped_dt: Any,
) -> Any:  # fmt: skip
    """Write the gradients of tokens.

    Returns:
        The gradients of D and bias of this chunk, and of the step size of the bias alone.
    """
    k, b, channel, count, at_u, _ = place
    seen, at, steps, _ = tokens
    policy = gap[0]
    dD, dbias, drest = broadcast(ZERO), broadcast(ZERO), broadcast(ZERO)
    for i in range(steps):
        token, t, more = _ahead(tokens, i)
        fetch(du, k, b, token, channel + more)
        fetch(ddelta, k, b, t, channel + more)
        token, t, row = seen[i], at[i], i * ROW
        u_t = read(u, k, b, token, at_u, count)
        dy_t, dx = get(work, row + DY), get(work, row + DX)
        ddelta_t = dx * u_t + get(work, row + DAGED) * LN_2
        if policy != NONE:
            own, drest_t = _gap_gradient(work, i, place, tokens, gap, later, dskipped_dt)
            ddelta_t, drest = ddelta_t + own, drest + drest_t
        if ddt.size:
            ddelta_t = ddelta_t + read(ddt, k, b, t, channel, count)
        if softplus:
            ddelta_t = ddelta_t * get(work, row + SLOPE)
        write(ddelta, k, b, t, channel, count, ddelta_t)
        write(du, k, b, token, channel, count, dx * get(work, row + DELTA) + dy_t * skip)
        dD = dD + dy_t * u_t
        dbias = dbias + ddelta_t
    return dD, dbias, drest


@kernel(
    COUNTER,
    *(floats(4), floats(4), floats(4)),
    *(floats(4), floats(4), floats(4), floats(5), floats(5), floats(4), floats(4)),
    *(floats(4), floats(4), floats(4)),
    *(floats(4), floats(4), floats(6), floats(6), floats(4), floats(4)),
    *(types.boolean, types.boolean[::1], types.int64, ORDER, types.boolean, types.int64),
)
def _scan_backward_kernel(
    counter: Any,
    dy: Any,
    dlast: Any,
    kept: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    bias: Any,
    skipped: Any,
    skipped_dt: Any,
    ddt: Any,
    du: Any,
    ddelta: Any,
    dB: Any,
    dC: Any,
    dparameters: Any,
    dskipped_dt: Any,
    softplus: bool,
    reverse: Any,
    policy: int,
    order: Any,
    by_token: bool,
    most: int,
) -> None:
    directions, batch, length, _ = u.shape
    groups, state = B.shape[3:]
    dim = A.shape[3]
    width = dim // groups
    parts = len(dB)
    A_log2e, dh, dA = vectors(most * state), vectors(most * state), vectors(most * state)
    dD, dbias, drest, carried = vectors(most), vectors(most), vectors(most), vectors(most)
    gap = (policy, skipped, skipped_dt)
    work = vectors(CHUNK * ROW)
    seen, at = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    weights, sums = np.empty(2 * state * CHUNK, np.float32), vectors(2 * state * CHUNK)
    while True:
        task = next_task(counter)
        if task >= directions * batch * groups * parts:
            break
        part, group = task % parts, task // parts % groups
        b, k = task // (parts * groups) % batch, task // (parts * groups * batch)
        start = group * width + part * most * WIDTH
        end = min(start + most * WIDTH, (group + 1) * width)
        blocks = -(-(end - start) // WIDTH)
        walk = walk_of(order, length, b, group, reverse[k], by_token)
        before_u, before_delta = shared_before(u, delta, dim, group * width)

        for block in range(blocks):
            channel = start + block * WIDTH
            count = min(WIDTH, end - channel)
            for n in range(state):
                row = block * state + n
                put(A_log2e, row, read(A, k, 0, n, channel, count) * LOG2_E)
                later = read(dlast, k, b, n, channel, count) if dlast.size else broadcast(ZERO)
                put(dh, row, later)
                put(dA, row, broadcast(ZERO))
            for sums_of in (dD, dbias, drest, carried):
                put(sums_of, block, broadcast(ZERO))

        for chunk in range(-(-walk[1] // CHUNK) - 1, -1, -1):
            steps = min(CHUNK, walk[1] - chunk * CHUNK)
            for i in range(steps):
                seen[i], at[i] = token_at(walk, chunk * CHUNK + i)
            tokens = (seen, at, steps, token_at(walk, chunk * CHUNK - 1)[1] if chunk else -1)
            for n in range(state):
                for i in range(steps):
                    t, pair = at[i], 2 * (n * CHUNK + i)
                    weights[pair], weights[pair + 1] = B[k, b, t, group, n], C[k, b, t, group, n]
                    put(sums, pair, broadcast(ZERO))
                    put(sums, pair + 1, broadcast(ZERO))

            for block in range(blocks):
                channel = start + block * WIDTH
                count = min(WIDTH, end - channel)
                place = (k, b, channel, count, channel - before_u, channel - before_delta)
                shift = read(bias, k, 0, 0, channel, count) if bias.size else broadcast(ZERO)
                skip = read(D, k, 0, 0, channel, count) if D.size else broadcast(ZERO)
                _load_chunk(work, u, delta, dy, shift, place, tokens, softplus, gap)
                for n in range(state):
                    row, pair = block * state + n, n * CHUNK
                    rate = get(A_log2e, row)
                    h = read(kept, k, b, chunk * state + n, channel, count)
                    _scan_again(work, sums, weights, pair, steps, rate, h)
                    earlier, more = _scan_back(
                        work, sums, weights, pair, steps, rate, get(dh, row), get(dA, row)
                    )
                    put(dh, row, earlier)
                    put(dA, row, more)
                dD_more, dbias_more, drest_more = _store_chunk(
                    work, u, skip, place, tokens, softplus,
                    gap, get(carried, block), ddt, du, ddelta, dskipped_dt,
                )  # fmt: skip
                put(dD, block, get(dD, block) + dD_more)
                put(dbias, block, get(dbias, block) + dbias_more)
                put(drest, block, get(drest, block) + drest_more)
                if policy == HOLD_PREV:
                    put(carried, block, get(work, DAGED) * LN_2 * skipped[k, b, at[0], 0])

            for n in range(state):
                for i in range(steps):
                    t, pair = at[i], 2 * (n * CHUNK + i)
                    dB[part, k, b, t, group, n] = total(get(sums, pair))
                    dC[part, k, b, t, group, n] = total(get(sums, pair + 1))

        for block in range(blocks):
            channel = start + block * WIDTH
            count = min(WIDTH, end - channel)
            for n in range(state):
                write(dparameters, b, k, n, channel, count, get(dA, block * state + n))
            write(dparameters, b, k, state, channel, count, get(dD, block))
            dbias_all = get(dbias, block)
            if policy == BIAS:
                shift = read(bias, k, 0, 0, channel, count)
                slope = functions.softplus(shift)[1] if softplus else broadcast(ONE)
                dbias_all = dbias_all + get(drest, block) * slope
            write(dparameters, b, k, state + 1, channel, count, dbias_all)


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    """Write the sum over the first axis to `out`, in a fixed order; overwrites the first part."""
    for part in parts[1:]:
        parts[0].add_(part)
    return out.copy_(parts[0])


def _division(blocks: int, rows: int) -> tuple[int, int]:
    """Return the most blocks of a task, and the tasks that share a row."""
    most = min(MOST_BLOCKS, -(-rows * blocks // ENOUGH_TASKS))
    return most, -(-blocks // most)


def scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    kept: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Sequence[Tensor],
    B: Tensor,
    C: Tensor,
    D: Sequence[Tensor] | None,
    bias: Sequence[Tensor] | None,
    du: Tensor,
    ddelta: Tensor,
    dB: Tensor,
    dC: Tensor,
    *,
    softplus: bool,
    reverse: Sequence[bool],
    skipped: Tensor | None = None,
    skipped_dt: Tensor | None = None,
    gap_policy: str = "none",
    ddt: Tensor | None = None,
    dskipped_dt: Tensor | None = None,
    order: Tensor | None = None,
    order_params: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Write the gradients of u, delta, B and C; return those of A, D and bias.

    Args:
        dy: Gradient of y, (directions, batch, length, dim).
        dlast: Gradient of the state after the last step, (directions, batch, dim, state).
        kept: As returned by `scan_forward`.
        u, delta, A, B, C, D, bias, softplus, reverse, skipped, skipped_dt, gap_policy: As in
            `scan_forward`, and so are order and order_params.
        du, ddelta, dB, dC: Outputs for the gradients of u, delta, B and C; of the first two with
            all channels, not written where a group does not come.
        ddt: Gradient of the step size after bias and softplus, shaped like u, or None.
        dskipped_dt: Output for that of skipped_dt, needed under "cached".

    Returns:
        The gradients of A, (directions, dim, state), and of D and bias, (directions, dim) or None.
    """
    directions, batch, length, dim = dy.shape
    groups, state = B.shape[3:]
    most, parts = _division(-(-dim // groups // WIDTH), directions * batch * groups)
    dB_parts, dC_parts = _parts(B, parts, length if order is None else order.shape[-2])
    dparameters = u.new_empty(batch, directions, state + 2, dim, dtype=torch.float32)
    inputs = (u, delta, per_channel(A), B, C, per_channel(D), per_channel(bias))
    gap = None if skipped is None else skipped[..., None], skipped_dt
    launch(
        _scan_backward_kernel,
        directions * batch * groups * parts,
        (dy, None if dlast is None else dlast.mT, kept, *inputs, *gap, ddt),
        (du, ddelta, dB_parts, dC_parts, dparameters, dskipped_dt),
        *(softplus, np.array(reverse, dtype=np.bool_), GAPS[gap_policy]),
        *(order_array(order), order_params, most),
    )
    sum_parts(dB_parts, dB)
    sum_parts(dC_parts, dC)
    return _of_parameters(dparameters, D, bias)


def _parts(B: Tensor, parts: int, steps: int) -> list[Tensor]:
    """Return gradients of B and C to be summed, of tasks that may not come to every token."""
    fresh = torch.zeros if steps < B.shape[2] else torch.empty
    return [fresh(parts, *B.shape, dtype=torch.float32) for _ in range(2)]


def _of_parameters(
    parts: Tensor, D: Sequence[Tensor] | None, bias: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    sums = sum_parts(parts, torch.empty_like(parts[0]))  # (directions, state + 2, dim)
    pairs = zip((D, bias), sums[:, -2:].unbind(dim=1), strict=True)
    dD, dbias = (None if parameter is None else grad.clone() for parameter, grad in pairs)
    return sums[:, :-2].mT.contiguous(), dD, dbias
