"""Steps of the backward scan kernel: a chunk forwards, a pair of tokens again, a token back."""

# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fambav.ops.triton.scan_tokens import LN_2, gap_of, of_token, step_size, token_part, upcast


@triton.jit
def channel_sum(parts, LEVELS: tl.constexpr) -> tl.tensor:
    """Sum a power of two of tensors (channels, PART) over channels.

    Returns:
        (1, tensors * PART): column c is element c // tensors of tensor c % tensors.
    """
    for _ in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            both = tl.join(parts[i], parts[i + len(parts) // 2])
            joined = joined + (tl.reshape(both, [both.shape[0], both.shape[1] * 2]),)
        parts = joined
    ones = tl.full([1, parts[0].shape[0]], 1.0, tl.float32)
    return tl.dot(ones, parts[0], input_precision="ieee")


@triton.jit
def _advance(h, aged, x, decay, B_rows, t, PART: tl.constexpr, STATE: tl.constexpr):
    """Return the decay of the state at a token, and the state after it."""
    share = ()
    after = ()
    for p in tl.static_range(len(decay)):
        share = share + (tl.exp2(aged * decay[p]),)
        after = after + (share[p] * h[p] + x * token_part(B_rows, t, p, PART, STATE),)
    return share, after


@triton.jit
def _put(scratch, pair, own, h):
    """Store the state before a pair; `own` are the offsets of one part."""
    for p in tl.static_range(len(h)):
        tl.store(scratch + (pair * len(h) + p) * own.shape[0] * own.shape[1] + own, h[p])


@triton.jit
def _aged(
    delta_t, delta_rows, gaps, token, step, shift, channel, here,
    SOFTPLUS: tl.constexpr,
    GAP: tl.constexpr,
):  # fmt: skip
    """Return the step size of the decay at a token.

    The gaps are their rows, the row of the scan, the number of channels, and the step size of a
    removed token under "bias".
    """
    aged = delta_t
    if GAP != "none":
        rest = gaps[3]
        if GAP == "hold_prev":
            before = of_token(delta_rows, tl.maximum(token - 1, 0) * step, channel, here)
            rest, _ = step_size(before, shift, SOFTPLUS)
        aged += gap_of(delta_t, rest, gaps[0], gaps[1], gaps[2], token * step, channel, here, GAP)
    return aged


@triton.jit
def walk(
    h, scratch, own, start, pairs, step, u_rows, delta_rows, B_rows, gaps,
    decay, shift, channel, here,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GAP: tl.constexpr,
    PART: tl.constexpr,
    STATE: tl.constexpr,
) -> None:  # fmt: skip
    """Scan a chunk forwards and store the state before each pair; never past the end."""
    for pair in range(pairs - 1):
        _put(scratch, pair, own, h)
        for s in tl.static_range(STEPS):
            token = start + pair * STEPS + s
            t = token * step
            delta_t, _ = step_size(of_token(delta_rows, t, channel, here), shift, SOFTPLUS)
            x = delta_t * of_token(u_rows, t, channel, here)
            aged = _aged(
                delta_t, delta_rows, gaps, token, step, shift, channel, here, SOFTPLUS, GAP
            )
            _, h = _advance(h, aged, x, decay, B_rows, t, PART, STATE)
    _put(scratch, pairs - 1, own, h)
    tl.debug_barrier()  # makes the stores of each thread visible to the others


@triton.jit
def pair_again(
    loaded, scratch, pair, own, start, length, step, delta_rows, B_rows, gaps,
    decay, shift, channel, here,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GAP: tl.constexpr,
    PART: tl.constexpr,
    STATE: tl.constexpr,
) -> tuple[Any, ...]:  # fmt: skip
    """Recompute the forward pass of a pair of the chunk at `start`.

    `loaded` are u and delta of each of its tokens.  A token after the end has step size 0; in its
    place stands the last one.

    Returns:
        The states before each token and after the last one, the decay at each token, the step
        sizes, those of the decay, and the derivatives of the former.
    """
    now = ()
    for p in tl.static_range(len(decay)):
        at = scratch + (pair * len(decay) + p) * own.shape[0] * own.shape[1] + own
        now = now + (tl.load(at),)
    token = start + pair * STEPS
    states = now
    shares = ()
    deltas = ()
    ageds = ()
    slopes = ()
    for s in tl.static_range(STEPS):
        real = token + s < length
        t = tl.minimum(token + s, length - 1) * step
        delta_t, slope = step_size(upcast(loaded[s * 2 + 1]), shift, SOFTPLUS)
        delta_t = tl.where(real, delta_t, 0.0)
        x = delta_t * upcast(loaded[s * 2])
        aged = _aged(
            delta_t, delta_rows, gaps, tl.minimum(token + s, length - 1), step,
            shift, channel, here, SOFTPLUS, GAP,
        )  # fmt: skip
        if GAP != "none":
            aged = tl.where(real, aged, 0.0)
        share, now = _advance(now, aged, x, decay, B_rows, t, PART, STATE)
        states = states + now
        shares = shares + share
        deltas = deltas + (delta_t,)
        ageds = ageds + (aged,)
        slopes = slopes + (slope,)
    tl.debug_barrier()  # as in retreat
    return states, shares, deltas, ageds, slopes


@triton.jit
def retreat(
    g, rate_sum, dy_t, delta_t, aged, u_t, share, before, after, decay, B_rows, C_rows, t,
    PART: tl.constexpr,
    STATE: tl.constexpr,
) -> tuple[Any, ...]:  # fmt: skip
    """Backpropagate the gradient of the state through a token.

    Returns:
        The gradient of the state before it, the accumulated gradient of A, the terms of dB and dC
        before their sum over channels, and the gradients of x = delta u and of the step size of
        the decay.
    """
    B_products = ()
    C_products = ()
    earlier = ()
    rates = ()
    from_B = tl.zeros(before[0].shape, tl.float32)
    from_A = tl.zeros(before[0].shape, tl.float32)
    for p in tl.static_range(len(decay)):
        g_p = g[p] + dy_t * token_part(C_rows, t, p, PART, STATE)
        from_B += g_p * token_part(B_rows, t, p, PART, STATE)
        B_products = B_products + (g_p * (delta_t * u_t),)
        C_products = C_products + (dy_t * after[p],)
        g_p *= share[p]
        P = g_p * before[p]
        from_A += P * decay[p]
        rates = rates + (rate_sum[p] + P * aged,)
        earlier = earlier + (g_p,)
        if p % 2 == 1:
            tl.debug_barrier()  # or all of B and C would be loaded ahead, which spills
    x_sum = tl.sum(from_B, axis=1, keep_dims=True)
    decay_sum = tl.sum(from_A, axis=1, keep_dims=True) * LN_2
    return earlier, rates, B_products + C_products, x_sum, decay_sum


@triton.jit
def through_gap(
    decay_sum, rest_sum, gap_rows, ddt, dskipped_dt, at, t, real, here,
    GAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Backpropagate through the step sizes in front of a token, whose place among all is `at`.

    Returns:
        What is added to the gradient of its own step size, and what gaps have gathered for the
        token before under "hold_prev", for the bias under "bias".
    """
    more = tl.zeros(decay_sum.shape, tl.float32)
    if ddt is not None:
        more += tl.load(ddt + at, mask=here, other=0.0)
    if GAP == "cached":
        tl.store(dskipped_dt + at, decay_sum, mask=here)
    elif GAP != "none":
        in_gap = tl.where(real, tl.load(gap_rows[0] + t) * decay_sum, 0.0)
        if GAP == "self":
            more += in_gap
        elif GAP == "bias":
            rest_sum += in_gap
        else:
            more += rest_sum
            rest_sum = in_gap
    return more, rest_sum


@triton.jit
def put_state_sums(
    out, sums, at, number, here, PART: tl.constexpr, PARTS: tl.constexpr, STATE: tl.constexpr
) -> None:
    """Write sums of each element of the state, PARTS tensors (channels, PART), to rows `at`."""
    out += at * STATE + number
    for p in tl.static_range(PARTS):
        tl.store(out + p * PART, sums[p], mask=here & (p * PART + number < STATE))
