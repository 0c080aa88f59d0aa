"""Gradients of the selective scans of both directions, as a Triton kernel.

With g the gradient of h[t], that is C[t] dy[t] + exp(delta[t+1] A) g[t+1], and
P = g exp(delta[t] A) h[t-1], the gradients are

    dB[t] = sum over channels of g delta[t] u[t]        dA = sum over t of P delta[t]
    dC[t] = sum over channels of dy[t] h[t]             dD = sum over t of dy[t] u[t]
    du[t] = delta[t] (g . B[t]) + D dy[t]               ddelta[t] = u[t] (g . B[t]) + P . A

where delta is after softplus, by whose derivative ddelta is multiplied.  Where tokens were removed,
their step sizes add to delta in the exponent and in dA, and P . A is their gradient, too.

A program loops from the last token to the first, for one block of channels of a sample in one
direction.  Each chunk is first scanned forwards from the state that the forward kernel kept, and
the state before every second token is stored to scratch in global memory, where one chunk of all
resident programs fits in the L2 cache.  Then it goes back pair by pair, recomputing states and
decays of two tokens in registers; u and delta of the next pair are loaded meanwhile, dy at its
start, as more would spill.

Sums over channels cross threads, each of which owns one channel and its whole state.  As a product
with a row of ones they are transposed once through shared memory and then summed by threads that
own columns; warp shuffles would take five steps per element.  Partial sums of blocks are added in
the order of the blocks, those of dA, dD and dbias in the order of the samples.

Scratch is of all programs, not of those that run: 50 MB for Vim-Ti at batch 128, 0.8 GB at 768
channels and batch 1024.  A grid of resident programs, each with a loop around all of the above,
would save a predicted 0.2 ms of a step of 28 and costs registers, of which none are left.  Partial
sums of B and C stay in float32, since a dozen rounded to bfloat16 would add to the error of a sum;
they are added and stored in place by a kernel of their own.

Issue slots per 32 state-steps in SASS (sm_90, Triton 3.7) at state 16 with softplus, bias and D,
both loops together: 34.7 in bfloat16.
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
    AUDITED,
    LANES,
    MEASURED,
    NO_GAP,
    SIZES,
    absent,
    as_floats,
    directions_back,
    each_way,
    index_type,
    state_form,
    variant,
)
from fambav.ops.triton.scan_steps import (
    channel_sum,
    pair_again,
    put_state_sums,
    retreat,
    through_gap,
    walk,
)
from fambav.ops.triton.scan_tokens import (
    LOG2_E,
    fetch,
    of_channels,
    only_if,
    put_token,
    rows_of_gaps,
    step_size,
    upcast,
)
from fambav.ops.triton.variant import Variant

STEPS = 2  # tokens of a pair; must divide CHUNK
SUMMED, SUM_WARPS = 1024, 4  # elements and warps of a program that sums over blocks

# Registers per thread (maxnreg): enough for two tokens and u and delta of the next two, without a
# spill on sm_80 either.  The compiler alone takes 240.  Ten to twelve warps are
# resident on a multiprocessor.
REGISTERS = {torch.bfloat16: 176, torch.float16: 192, torch.float32: 200}
GAP_REGISTERS = {torch.bfloat16: 184, torch.float16: 192, torch.float32: 208}  # with gaps


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
    skipped, skipped_dt, ddt, dskipped_dt, dBC, dA, dD, dbias, scratch,
    length, size, groups, blocks, images, reverse,
    dy_direction, dy_batch, dy_token, dy_channel, u_direction, u_batch, u_token, u_channel,
    delta_direction, delta_batch, delta_token, delta_channel,
    B_direction, B_batch, B_token, B_group, B_state,
    C_direction, C_batch, C_token, C_group, C_state,
    du_direction, du_batch, du_token, du_channel,
    ddelta_direction, ddelta_batch, ddelta_token, ddelta_channel,
    STATE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, GAP: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    direction = tl.program_id(1).to(tl.int64)
    image = (place // (blocks * groups)).to(tl.int64)
    group, block = place // blocks % groups, place % blocks
    number = tl.arange(0, PART)[None, :]
    in_group = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    here = in_group < size
    channel = group * size + in_group
    dim, row = size * groups, direction * images + image
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
    skip_sum, shift_sum = tl.zeros([BLOCK, 1], tl.float32), tl.zeros([BLOCK, 1], tl.float32)
    rest, rest_slope = step_size(shift, 0.0, SOFTPLUS)
    rest_sum = tl.zeros([BLOCK, 1], tl.float32)  # what the gaps behind a token add to its gradient

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
    gaps = (rows_of_gaps(skipped, skipped_dt, row * length + first, dim, GAP), row, dim, rest)
    own_rows = ((block * tl.num_programs(1) * images + row) * length + first) * groups + group
    dBC += own_rows * (2 * PARTS * PART)
    column = tl.arange(0, 2 * PARTS * PART)[None, :]
    column = column % (2 * PARTS) * PART + column // (2 * PARTS)
    scratch += (direction * tl.num_programs(0) + place) * (CHUNK // STEPS) * BLOCK * PARTS * PART
    own = tl.arange(0, BLOCK)[:, None] * PART + number
    kept += (row * ((length - 1) // CHUNK) * PARTS * dim + channel) * PART + number

    chunks = tl.cdiv(length, CHUNK)
    rows = (u_rows, delta_rows)
    last = (length - 1) // STEPS * STEPS
    ahead = fetch(rows, last, length, step, (channel,), (here,), STEPS)
    for i in range(chunks):
        start = (chunks - 1 - i) * CHUNK
        pairs = tl.cdiv(tl.minimum(length - start, CHUNK), STEPS)
        h = ()
        for p in tl.static_range(PARTS):
            part = ((chunks - 2 - i) * PARTS + p).to(tl.int64) * PART * dim
            h = h + (upcast(tl.load(kept + part, mask=only_if(start > 0, here), other=0.0)),)
        walk(
            h, scratch, own, start, pairs, step, u_rows, delta_rows, B_rows, gaps,
            decay, shift, channel, here, STEPS, SOFTPLUS, GAP, PART, STATE,
        )  # fmt: skip
        for j in range(pairs):
            pair = pairs - 1 - j
            token = start + pair * STEPS
            now, dys = ahead, fetch((dy_rows,), token, length, step, (channel,), (here,), STEPS)
            ahead = fetch(rows, token - STEPS, length, step, (channel,), (here,), STEPS)
            states, shares, deltas, ageds, slopes = pair_again(
                now, scratch, pair, own, start, length, step, delta_rows, B_rows, gaps,
                decay, shift, channel, here, STEPS, SOFTPLUS, GAP, PART, STATE,
            )  # fmt: skip
            for s in tl.static_range(STEPS - 1, -1, -1):
                real = token + s < length  # else its gradient is 0
                here_now = only_if(real, here)
                t = tl.minimum(token + s, length - 1) * step
                u_t, dy_t = upcast(now[s * 2]), tl.where(real, upcast(dys[s]), 0.0)
                g, rate_sum, products, x_sum, decay_sum = retreat(
                    g, rate_sum, dy_t, deltas[s], ageds[s], u_t,
                    shares[s * PARTS : (s + 1) * PARTS],
                    states[s * PARTS : (s + 1) * PARTS], states[(s + 1) * PARTS : (s + 2) * PARTS],
                    decay, B_rows, C_rows, t, PART, STATE,
                )  # fmt: skip
                own_dt = (row * length + first + t) * dim + channel
                more, rest_sum = through_gap(
                    decay_sum, rest_sum, gaps[0], ddt, dskipped_dt, own_dt, t, real, here_now, GAP
                )
                dstep = u_t * x_sum + decay_sum + more
                ddelta_t = tl.where(real, dstep * slopes[s], 0.0)
                shift_sum += ddelta_t
                skip_sum += dy_t * u_t
                put_token(du_rows, t, channel, here_now, deltas[s] * x_sum + skip * dy_t)
                put_token(ddelta_rows, t, channel, here_now, ddelta_t)
                dBC_at = dBC + t * groups * (2 * PARTS * PART) + column
                tl.store(dBC_at, channel_sum(products, LEVELS), mask=only_if(real, column >= 0))

    put_state_sums(dA, rate_sum, row * dim + channel, number, here, PART, PARTS, STATE)
    if D_0 is not None:
        tl.store(dD + row * dim + channel, skip_sum, mask=here)
    if bias_0 is not None:
        if GAP == "bias":
            shift_sum += rest_sum * rest_slope
        tl.store(dbias + row * dim + channel, shift_sum, mask=here)


def scan_backward(  # noqa: D417  as in scan_forward
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
    partial: bool = False,
    block: int | None = None,
    warps: int | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the parameters of a scan; write those of the tokens.

    Args:
        dy: Gradient of y, (directions, batch, length, dim), any strides.
        dlast: Gradient of the last state, (directions, batch, dim, state), float32, or None.
        kept: The states that the forward pass kept, float32 or bfloat16.
        u, delta, A, B, C, D, bias, softplus, reverse, gaps: As in `scan_forward`.
        du, dB, dC: Outputs for the gradients of u, B and C, any strides and float dtype.
        ddelta: Output for the gradient of delta before bias and softplus, shaped like u, likewise.
        ddt: Gradient of the step size after bias and softplus, shaped like u, or None.
        dskipped_dt: Output for that of skipped_dt, shaped like u, float32; for "cached".
        partial: Leave the sums over the batch to the caller.
        block, warps, chunk: As in the forward pass; chunk is a multiple of 2.

    Returns:
        dA, (directions, dim, state), dD and dbias, (directions, dim), or None; all float32.  With
        `partial` the batch is the second axis.
    """
    form = _form(B.shape[4], block or LANES, chunk, softplus=softplus, gap=gap_policy)
    tokens = dy, u, delta, B, C, du, ddelta
    states = None if dlast is None else dlast.contiguous(), kept
    parts = dBC, dA, dD, dbias = _parts(u, B, D, bias, form)
    far = None if dskipped_dt is None else dskipped_dt.contiguous()
    gaps = *as_floats(skipped, skipped_dt, ddt), far
    given = *each_way(A), *each_way(D), *each_way(bias), *gaps
    _launch(tokens, states, given, parts, reverse, form, warps or 1)
    if dskipped_dt is not None and far is not None and far is not dskipped_dt:
        dskipped_dt.copy_(far)
    _sum_blocks(dBC, dB, dC)
    if not partial:
        dD, dbias = (None if part is None else part.sum(dim=1) for part in (dD, dbias))
    return dA if partial else dA.sum(dim=1), dD, dbias


@triton.jit(do_not_specialize=["blocks", "rows", "batch", "length"])
def _sum_blocks_kernel(
    parts, dB, dC, blocks, rows, batch, length, groups,
    dB_direction, dB_batch, dB_token, dB_group, dB_state,
    dC_direction, dC_batch, dC_token, dC_group, dC_state,
    STATE: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, 2 * PADDED)[None, :]
    inside = (row < rows) & (column >= 0)
    place = parts + row * (2 * PADDED) + column
    total = tl.zeros([TOKENS, 2 * PADDED], tl.float32)
    for _ in range(blocks):
        total += tl.load(place, mask=inside, other=0.0)
        place += rows.to(tl.int64) * (2 * PADDED)
    group, token = row % groups, row // groups % length
    image = row // groups // length % batch
    direction = row // groups // length // batch
    number = column % PADDED
    of_B = inside & (column < STATE)
    of_C = inside & (column >= PADDED) & (number < STATE)
    dB += direction * dB_direction + image * dB_batch + token * dB_token + group * dB_group
    dC += direction * dC_direction + image * dC_batch + token * dC_token + group * dC_group
    tl.store(dB + number * dB_state, total, mask=of_B)
    tl.store(dC + number * dC_state, total, mask=of_C)


def _sum_blocks(parts: Tensor, dB: Tensor, dC: Tensor) -> None:
    """Sum the parts of blocks of channels, in the order of the blocks, into dB and dC.

    Args:
        parts: (blocks, directions, batch, length, groups, 2, padded state).
        dB: Output, as of `scan_backward`.
        dC: Likewise.
    """
    blocks, directions, batch, length, groups, _, padded = parts.shape
    rows, form = directions * batch * length * groups, _sum_form(dB.shape[4], padded)
    with on_device(parts):
        _sum_blocks_kernel[(triton.cdiv(rows, form["TOKENS"]),)](
            parts, dB, dC, blocks, rows, batch, length, groups, *dB.stride(), *dC.stride(),
            **form, num_warps=SUM_WARPS, **OPTIONS,
        )  # fmt: skip


def _sum_form(state: int, padded: int) -> dict[str, int]:
    return dict(STATE=state, PADDED=padded, TOKENS=max(SUMMED // (2 * padded), 1))


def _form(
    state: int, block: int, chunk: int = CHUNK, *, softplus: bool = True, gap: str = "none"
) -> dict[str, Any]:
    """Return the constants of a specialization, without the type of its offsets."""
    if chunk % STEPS:
        raise ValueError(f"chunk is {chunk}, expected a multiple of {STEPS}")
    form = state_form(state) | dict(
        CHUNK=chunk, STEPS=STEPS, BLOCK=block, SOFTPLUS=softplus, GAP=gap
    )
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
        parameters: A, D and bias, each of both directions; skipped, skipped_dt, ddt, dskipped_dt.
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
            maxnreg=registers(u.dtype, form["STATE"], form["GAP"]), **OPTIONS,
        )  # fmt: skip


def registers(dtype: torch.dtype, state: int, gap: str = "none") -> int | None:
    """Return the limit of registers per thread (maxnreg), or None for no limit."""
    limits = REGISTERS if gap == "none" else GAP_REGISTERS
    return limits[dtype] if state <= 16 else None


def variants() -> Iterator[Variant]:
    """Yield the specializations of the models: channels and state contiguous, state 1 and 16."""
    for dtype in POINTERS:
        form: dict[str, Any] = _sum_form(16, 16)
        numbers = [name for name in _sum_blocks_kernel.arg_names if name not in form]
        types = dict.fromkeys(numbers, "i32") | {"parts": "*fp32"}
        types |= dict.fromkeys(("dB", "dC"), POINTERS[dtype])
        ones = ("groups", "dB_state", "dC_state")
        rows = ("_direction", "_batch", "_token", "_group")
        aligned = ("parts", "dB", "dC", *(name for name in numbers if name.endswith(rows)))
        what = f"sum_blocks {POINTERS[dtype][1:]} N16"
        yield Variant(what, _sum_blocks_kernel, types, form, SUM_WARPS, aligned, ones)
    for dtype, state in (*product(MEASURED, (1,)), *product(POINTERS, (16,))):
        form = _form(state, LANES) | dict(INDEX=tl.int32, dlast=None, ddt=None, dskipped_dt=None)
        form |= NO_GAP
        what = f"{POINTERS[dtype][1:]} N{state} BD{LANES}"
        work = (LANES * state * STEPS,) * 2
        made = variant(f"scan_backward {what}", _scan_backward_kernel, dtype, form, work)
        yield made._replace(registers=registers(dtype, state))
    for dtype, gap in AUDITED:
        form = _form(16, LANES, gap=gap) | dict(INDEX=tl.int32, dlast=None) | absent(gap)
        form |= {} if gap == "cached" else dict(ddt=None, dskipped_dt=None)
        what = f"{POINTERS[dtype][1:]} N16 BD{LANES} {gap}"
        work = (LANES * 16 * STEPS,) * 2
        made = variant(f"scan_backward {what}", _scan_backward_kernel, dtype, form, work)
        yield made._replace(registers=registers(dtype, 16, gap))
