"""Gradients of the selective scans of both directions, as a Triton kernel.

With g the gradient of h[t], that is C[t] dy[t] + exp(delta[t+1] A) g[t+1], and
P = g exp(delta[t] A) h[t-1], the gradients are

    dB[t] = sum over channels of g delta[t] u[t]        dA = sum over t of P delta[t]
    dC[t] = sum over channels of dy[t] h[t]             dD = sum over t of dy[t] u[t]
    du[t] = delta[t] (g . B[t]) + D dy[t]               ddelta[t] = u[t] (g . B[t]) + P . A

where delta is after softplus, by whose derivative ddelta is multiplied.

A program loops from the last token to the first, for one block of channels of a sample in one
direction.  Each chunk is first scanned forwards from the state that the forward kernel kept, and
the state before every second token is stored to scratch in global memory, where one chunk of all
resident programs fits in the L2 cache.  Then it goes back pair by pair, recomputing states and
decays of two tokens in registers.

Sums over channels cross threads, each of which owns one channel and its whole state.  As a product
with a row of ones they are transposed once through shared memory and then summed by threads that
own columns; warp shuffles would take five steps per element.  Partial sums of blocks are added in
the order of the blocks, those of dA, dD and dbias in the order of the samples.

Issue slots per 32 state-steps in SASS (sm_90, Triton 3.7) at state 16 with softplus, bias and D,
both loops together: 34.6 in bfloat16 and 30.2 in float32.
"""

# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fambav.ops.kept_states import TRITON_CHUNK as CHUNK
from fambav.ops.triton.launch import OPTIONS, POINTERS, on_device
from fambav.ops.triton.scan_forward import (
    LANES,
    LN_2,
    LOG2_E,
    SIZES,
    directions_back,
    each_way,
    index_type,
    of_channels,
    of_token,
    put_token,
    state_form,
    step_size,
    token_part,
    variant,
)
from fambav.ops.triton.variant import Variant

STEPS = 2  # tokens of a pair; must divide CHUNK

# Registers per thread (maxnreg) by itemsize: enough for two tokens without spilling.  The compiler
# alone takes 240; with 168 the occupancy is twelve warps per multiprocessor, with 192 ten.  On
# sm_90 184 (eleven warps) would do for float32, but spills on sm_80.
REGISTERS = {2: 168, 4: 192}


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
def _if(condition, mask):
    """Return the mask where the scalar condition holds, else an empty one.

    In the interpreter of Triton 3.9, `&` of a block and a scalar is not a mask yet.
    """
    return (mask & condition) != 0


@triton.jit
def _advance(h, delta_t, x, decay, B_rows, t, PART: tl.constexpr, STATE: tl.constexpr):
    """Return the decay of the state at a token, and the state after it."""
    share = ()
    after = ()
    for p in tl.static_range(len(decay)):
        share = share + (tl.exp2(delta_t * decay[p]),)
        after = after + (share[p] * h[p] + x * token_part(B_rows, t, p, PART, STATE),)
    return share, after


@triton.jit
def _put(scratch, pair, own, h):
    """Store the state before a pair; `own` are the offsets of one part."""
    for p in tl.static_range(len(h)):
        tl.store(scratch + (pair * len(h) + p) * own.shape[0] * own.shape[1] + own, h[p])


@triton.jit
def _walk(
    h, scratch, own, start, pairs, step, u_rows, delta_rows, B_rows, decay, shift, channel, here,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PART: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """Scan a chunk forwards and store the state before each pair; never past the end."""
    for pair in range(pairs - 1):
        _put(scratch, pair, own, h)
        for s in tl.static_range(STEPS):
            t = (start + pair * STEPS + s) * step
            delta_t, _ = step_size(of_token(delta_rows, t, channel, here), shift, SOFTPLUS)
            x = delta_t * of_token(u_rows, t, channel, here)
            _, h = _advance(h, delta_t, x, decay, B_rows, t, PART, STATE)
    _put(scratch, pairs - 1, own, h)
    tl.debug_barrier()  # makes the stores of each thread visible to the others


@triton.jit
def _pair_again(
    scratch, pair, own, start, length, step, u_rows, delta_rows, B_rows,
    decay, shift, channel, here,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PART: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """Recompute the forward pass of a pair of the chunk at `start`.

    A token after the end has step size 0; in its place the last one is loaded.

    Returns:
        The states before each token and after the last one, the decay at each token, the step sizes
        and their derivatives.
    """
    now = ()
    for p in tl.static_range(len(decay)):
        at = scratch + (pair * len(decay) + p) * own.shape[0] * own.shape[1] + own
        now = now + (tl.load(at),)
    token = start + pair * STEPS
    states = now
    shares = ()
    deltas = ()
    slopes = ()
    for s in tl.static_range(STEPS):
        real = token + s < length
        t = tl.minimum(token + s, length - 1) * step
        delta_t, slope = step_size(of_token(delta_rows, t, channel, here), shift, SOFTPLUS)
        delta_t = tl.where(real, delta_t, 0.0)
        x = delta_t * of_token(u_rows, t, channel, here)
        share, now = _advance(now, delta_t, x, decay, B_rows, t, PART, STATE)
        states = states + now
        shares = shares + share
        deltas = deltas + (delta_t,)
        slopes = slopes + (slope,)
    tl.debug_barrier()  # as in _retreat
    return states, shares, deltas, slopes


@triton.jit
def _retreat(
    g, rate_sum, dy_t, delta_t, u_t, share, before, after, decay, B_rows, C_rows, t,
    PART: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """Backpropagate the gradient of the state through a token.

    Returns:
        The gradient of the state before it, the accumulated gradient of A, the terms of dB and dC
        before their sum over channels, and the gradients of x = delta u and of delta in the decay.
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
        rates = rates + (rate_sum[p] + P * delta_t,)
        earlier = earlier + (g_p,)
        if p % 2 == 1:
            tl.debug_barrier()  # or all of B and C would be loaded ahead, which spills
    x_sum = tl.sum(from_B, axis=1, keep_dims=True)
    decay_sum = tl.sum(from_A, axis=1, keep_dims=True) * LN_2
    return earlier, rates, B_products + C_products, x_sum, decay_sum


@triton.jit(
    do_not_specialize=[
        *SIZES,
        *("dy_direction", "dy_batch", "dy_token"),
        *("u_direction", "u_batch", "u_token"),
        *("delta_direction", "delta_batch", "delta_token"),
        *("du_direction", "du_batch", "du_token"),
        *("ddelta_direction", "ddelta_batch", "ddelta_token"),
    ]
)
def _scan_backward_kernel(
    dy, u, delta, B, C, du, ddelta, dlast, kept, A_0, A_1, D_0, D_1, bias_0, bias_1,
    dBC, dA, dD, dbias, scratch,
    length, size, groups, blocks, images, reverse,
    dy_direction, dy_batch, dy_token, dy_channel,
    u_direction, u_batch, u_token, u_channel,
    delta_direction, delta_batch, delta_token, delta_channel,
    B_direction, B_batch, B_token, B_group, B_state,
    C_direction, C_batch, C_token, C_group, C_state,
    du_direction, du_batch, du_token, du_channel,
    ddelta_direction, ddelta_batch, ddelta_token, ddelta_channel,
    STATE: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    direction = tl.program_id(1).to(tl.int64)
    image = (place // (blocks * groups)).to(tl.int64)
    group = place // blocks % groups
    block = place % blocks
    number = tl.arange(0, PART)[None, :]
    in_group = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    here = in_group < size
    channel = group * size + in_group
    dim = size * groups
    row = direction * images + image
    back = (reverse >> tl.program_id(1)) & 1
    first = (back * (length - 1)).to(tl.int64)
    step = (1 - 2 * back).to(INDEX)

    decay = ()
    g = ()
    rate_sum = ()
    for p in tl.static_range(PARTS):
        inside = here & (p * PART + number < STATE)
        at = channel * STATE + p * PART + number
        decay = decay + (of_channels(A_0, A_1, direction, at, inside) * LOG2_E,)
        rate_sum = rate_sum + (tl.zeros([BLOCK, PART], tl.float32),)
        if dlast is None:
            g = g + (tl.zeros([BLOCK, PART], tl.float32),)
        else:
            g = g + (tl.load(dlast + row * dim * STATE + at, mask=inside, other=0.0),)
    shift = of_channels(bias_0, bias_1, direction, channel, here)
    skip = of_channels(D_0, D_1, direction, channel, here)
    skip_sum = tl.zeros([BLOCK, 1], tl.float32)
    shift_sum = tl.zeros([BLOCK, 1], tl.float32)

    dy += direction * dy_direction + image * dy_batch + first * dy_token
    u += direction * u_direction + image * u_batch + first * u_token
    delta += direction * delta_direction + image * delta_batch + first * delta_token
    B += direction * B_direction + image * B_batch + group * B_group + first * B_token
    C += direction * C_direction + image * C_batch + group * C_group + first * C_token
    du += direction * du_direction + image * du_batch + first * du_token
    ddelta += direction * ddelta_direction + image * ddelta_batch + first * ddelta_token
    u_rows, delta_rows = (u, u_token, u_channel), (delta, delta_token, delta_channel)
    du_rows, ddelta_rows = (du, du_token, du_channel), (ddelta, ddelta_token, ddelta_channel)
    B_rows, C_rows = (B, B_token, B_state), (C, C_token, C_state)
    dy_rows = (dy, dy_token, dy_channel)
    dBC += ((block * tl.num_programs(1) * images + row) * length + first) * groups * (
        2 * PARTS * PART
    ) + group * (2 * PARTS * PART)
    column = tl.arange(0, 2 * PARTS * PART)[None, :]
    column = column % (2 * PARTS) * PART + column // (2 * PARTS)
    scratch += (direction * tl.num_programs(0) + place) * (CHUNK // STEPS) * BLOCK * PARTS * PART
    own = tl.arange(0, BLOCK)[:, None] * PART + number
    kept += (row * ((length - 1) // CHUNK) * PARTS * dim + channel) * PART + number

    chunks = tl.cdiv(length, CHUNK)
    for i in range(chunks):
        start = (chunks - 1 - i) * CHUNK
        pairs = tl.cdiv(tl.minimum(length - start, CHUNK), STEPS)
        h = ()
        for p in tl.static_range(PARTS):
            part = ((chunks - 2 - i) * PARTS + p).to(tl.int64) * PART * dim
            h = h + (tl.load(kept + part, mask=_if(start > 0, here), other=0.0),)
        _walk(
            h, scratch, own, start, pairs, step, u_rows, delta_rows, B_rows,
            decay, shift, channel, here, STEPS, SOFTPLUS, PART, STATE,
        )  # fmt: skip
        for j in range(pairs):
            pair = pairs - 1 - j
            states, shares, deltas, slopes = _pair_again(
                scratch, pair, own, start, length, step, u_rows, delta_rows, B_rows,
                decay, shift, channel, here, STEPS, SOFTPLUS, PART, STATE,
            )  # fmt: skip
            token = start + pair * STEPS
            for s in tl.static_range(STEPS - 1, -1, -1):
                real = token + s < length  # else its gradient is 0
                here_now = _if(real, here)
                t = tl.minimum(token + s, length - 1) * step
                u_t = of_token(u_rows, t, channel, here)
                dy_t = of_token(dy_rows, t, channel, here_now)
                g, rate_sum, products, x_sum, decay_sum = _retreat(
                    g, rate_sum, dy_t, deltas[s], u_t, shares[s * PARTS : (s + 1) * PARTS],
                    states[s * PARTS : (s + 1) * PARTS], states[(s + 1) * PARTS : (s + 2) * PARTS],
                    decay, B_rows, C_rows, t, PART, STATE,
                )  # fmt: skip
                ddelta_t = tl.where(real, (u_t * x_sum + decay_sum) * slopes[s], 0.0)
                du_t = deltas[s] * x_sum + skip * dy_t
                shift_sum += ddelta_t
                skip_sum += dy_t * u_t
                put_token(du_rows, t, channel, here_now, du_t)
                put_token(ddelta_rows, t, channel, here_now, ddelta_t)
                dBC_at = dBC + t * groups * (2 * PARTS * PART) + column
                tl.store(dBC_at, channel_sum(products, LEVELS), mask=_if(real, column >= 0))

    dA += (row * dim + channel) * STATE + number
    for p in tl.static_range(PARTS):
        tl.store(dA + p * PART, rate_sum[p], mask=here & (p * PART + number < STATE))
    if D_0 is not None:
        tl.store(dD + row * dim + channel, skip_sum, mask=here)
    if bias_0 is not None:
        tl.store(dbias + row * dim + channel, shift_sum, mask=here)


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
    block: int | None = None,
    warps: int | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the parameters of a scan; write those of the tokens.

    Args:
        dy: Gradient of y, (directions, batch, length, dim), any strides.
        dlast: Gradient of the last state, (directions, batch, dim, state), float32, or None.
        kept: The states that the forward pass kept.
        u: As in `scan_forward`, like all arguments not named here.
        delta: Shaped like u.
        A: (dim, state) for each direction.
        B: (directions, batch, length, groups, state).
        C: Shaped like B.
        D: (dim,) for each direction, or None.
        bias: (dim,) for each direction, or None.
        du: Output for the gradient of u, shaped like u, any strides and float dtype.
        ddelta: Output for the gradient of delta before bias and softplus, shaped like u, likewise.
        dB: Output for the gradient of B, shaped like B, likewise.
        dC: Output for the gradient of C, shaped like B, likewise.
        softplus: Whether delta went through softplus.
        reverse: Of each direction.
        block: Channels of a program, a power of 2, at least 32.
        warps: Warps of a program.
        chunk: Tokens from one kept state to the next, as in the forward pass; a multiple of 2.

    Returns:
        dA, (directions, dim, state), dD and dbias, (directions, dim), or None; all float32.
    """
    form = _form(B.shape[4], block or LANES, chunk, softplus=softplus)
    tokens = dy, u, delta, B, C, du, ddelta
    states = None if dlast is None else dlast.contiguous(), kept
    parameters = *each_way(A), *each_way(D), *each_way(bias)
    parts = dBC, dA, dD, dbias = _parts(u, B, D, bias, form)
    _launch(tokens, states, parameters, parts, reverse, form, warps or 1)
    for output, total in zip((dB, dC), dBC.sum(dim=0).unbind(dim=-2), strict=True):
        output.copy_(total[..., : form["STATE"]])
    dD, dbias = (None if part is None else part.sum(dim=1) for part in (dD, dbias))
    return dA.sum(dim=1), dD, dbias


def _form(state: int, block: int, chunk: int = CHUNK, *, softplus: bool = True) -> dict[str, Any]:
    """Return the constants of a specialization, without the type of its offsets."""
    if chunk % STEPS:
        raise ValueError(f"chunk is {chunk}, expected a multiple of {STEPS}")
    form = state_form(state) | dict(CHUNK=chunk, STEPS=STEPS, BLOCK=block, SOFTPLUS=softplus)
    return form | dict(LEVELS=(2 * form["PARTS"]).bit_length() - 1)


def _parts(
    u: Tensor,
    B: Tensor,
    D: Sequence[Tensor] | None,
    bias: Sequence[Tensor] | None,
    form: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return buffers for partial sums: dB and dC of each block; dA, dD and dbias of each sample."""
    directions, batch, length, dim = u.shape
    groups, state = B.shape[3:]
    blocks = triton.cdiv(dim // groups, form["BLOCK"])
    single = partial(u.new_empty, dtype=torch.float32)
    dBC = single(blocks, directions, batch, length, groups, 2, form["PARTS"] * form["PART"])
    dA = single(directions, batch, dim, state)
    dD, dbias = (None if x is None else single(directions, batch, dim) for x in (D, bias))
    return dBC, dA, dD, dbias


def _launch(
    tokens: Sequence[Tensor],
    states: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    reverse: Sequence[bool],
    form: Mapping[str, Any],
    warps: int,
) -> None:
    """Run the kernel.

    Args:
        tokens: dy, u, delta, B, C, du and ddelta.
        states: dlast and the kept states.
        parameters: A, D and bias, each of both directions.
        parts: Outputs, as `_parts` returns them.
        reverse: Of each direction.
        form: As `_form` returns it.
        warps: Warps of a program.
    """
    u = tokens[1]
    blocks, directions, batch, length, groups, _, padded = parts[0].shape
    programs = batch * groups * blocks
    scratch = u.new_empty(
        (directions * programs, form["CHUNK"] // STEPS, form["BLOCK"], padded), dtype=torch.float32
    )
    sizes = length, u.shape[3] // groups, groups, blocks, batch, directions_back(reverse)
    strides = chain.from_iterable(tensor.stride() for tensor in tokens)
    index = index_type(length, *tokens, parts[0][0])
    with on_device(u):
        _scan_backward_kernel[(programs, directions)](
            *tokens, *states, *parameters, *parts, scratch, *sizes, *strides,
            **form, INDEX=index, num_warps=warps,
            maxnreg=registers(u.dtype, form["STATE"]), **OPTIONS,
        )  # fmt: skip


def registers(dtype: torch.dtype, state: int) -> int | None:
    """Return the limit of registers per thread (maxnreg), or None for no limit."""
    return REGISTERS[dtype.itemsize] if state <= 16 else None


def variants() -> Iterator[Variant]:
    """Yield the usual specializations: channels and state contiguous."""
    for dtype, state in product(POINTERS, (1, 8, 16)):
        form = _form(state, LANES) | dict(INDEX=tl.int32, dlast=None)
        what = f"{POINTERS[dtype][1:]} N{state} BD{LANES}"
        work = (LANES * state * STEPS,) * 2
        made = variant(f"scan_backward {what}", _scan_backward_kernel, dtype, form, work)
        yield made._replace(registers=registers(dtype, state))
