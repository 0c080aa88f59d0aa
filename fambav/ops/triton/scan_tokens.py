"""What both scans do with a token, as Triton functions: read, write, step size, gaps."""

# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950216293335)  # rounded to float32
LOG2_E_REST = tl.constexpr(1.9259629911266175e-08)  # its rounding error
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def only_if(condition, mask) -> tl.tensor:
    """Return the mask where the scalar condition holds, else an empty one.

    In the interpreter of Triton 3.9, `&` of a block and a scalar is not a mask yet.
    """
    return (mask & condition) != 0


@triton.jit
def upcast(x) -> tl.tensor:
    """Cast to float32; two bfloat16 in a word take one instruction each."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def softplus(x) -> tuple[tl.tensor, tl.tensor]:
    """Return log(1 + exp(x)) and its derivative, with small relative errors for all x.

    The polynomial is log(1 + e) / e for e in 0..1, relative error 3.4e-7 in float32, fitted by
    iteratively reweighted least squares.  The rounding error of |x| log2(e) is compensated in e,
    whose relative error would otherwise grow with |x|.
    """
    x_abs = tl.abs(x)
    power = x_abs * LOG2_E
    lost = tl.fma(x_abs, LOG2_E_REST, tl.fma(x_abs, LOG2_E, -power))
    e = tl.exp2(-power)
    e = tl.fma(e * lost, -LN_2, e)
    log = tl.fma(e, -0.00853916816, 0.0440894887)
    log = tl.fma(e, log, -0.10768152)
    log = tl.fma(e, log, 0.177452281)
    log = tl.fma(e, log, -0.244954586)
    log = tl.fma(e, log, 0.332754791)
    log = tl.fma(e, log, -0.499974042)
    log = tl.fma(e, log, 0.999999821) * e
    return tl.maximum(x, 0.0) + log, tl.exp2((tl.minimum(x, 0.0) - log) * LOG2_E)


@triton.jit
def of_channels(first, second, direction, channel, here) -> tl.tensor:
    """Load the parameters of the channels in this direction; 0 outside of the mask."""
    if first is None:
        value = tl.zeros(channel.shape, tl.float32)
    else:
        own = tl.where(direction == 0, first, second)
        value = tl.load(own + channel, mask=here, other=0.0)
    return value


@triton.jit
def step_size(delta, shift, SOFTPLUS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the step size and its derivative from delta before bias and softplus."""
    delta += shift
    slope = tl.full(delta.shape, 1.0, tl.float32)
    if SOFTPLUS:
        delta, slope = softplus(delta)
    return delta, slope


@triton.jit
def rows_of_gaps(skipped, skipped_dt, place, dim, GAP: tl.constexpr) -> tuple[Any, Any]:
    """Return pointers to the first token, whose place among all is `place`."""
    rows = (skipped, skipped_dt)
    if GAP == "cached":
        rows = (skipped, skipped_dt + place * dim)
    elif GAP != "none":
        rows = (skipped + place, skipped_dt)
    return rows


@triton.jit
def gap_of(delta_t, rest, gap_rows, row, dim, t, channel, here, GAP: tl.constexpr) -> tl.tensor:
    """Return the step sizes of what was removed in front of the token t.

    The rows of gaps are pointers to the first token of `skipped` and of `skipped_dt`; `rest` is the
    step size of each removed token under "bias" and "hold_prev".
    """
    if GAP == "cached":
        at = gap_rows[1] + t * dim.to(tl.int64) + channel
        return tl.load(at, mask=here, other=0.0)
    count = tl.load(gap_rows[0] + t)
    if GAP == "self":
        return count * delta_t
    return count * rest


@triton.jit
def token_part(rows, t, p: tl.constexpr, PART: tl.constexpr, STATE: tl.constexpr) -> tl.tensor:
    """Load part p of B or C of the token t, PART elements, as float32.

    The rows are a pointer to token 0 and the strides of tokens and state.  All threads load the
    same elements; pointers that were live across the loop would be distributed over the threads,
    and the elements exchanged.
    """
    number = p * PART + tl.arange(0, PART)[None, :]
    at = rows[0] + t * rows[1] + number * rows[2]
    if p * PART + PART <= STATE:
        return upcast(tl.load(at))
    return upcast(tl.load(at, mask=number < STATE, other=0.0))


@triton.jit
def of_token(rows, t, channel, here) -> tl.tensor:
    """Load the channels of the token t as float32.

    The rows are a pointer to token 0 and the strides of tokens and channels.
    """
    at = rows[0] + t * rows[1] + channel.to(tl.int64) * rows[2]
    return upcast(tl.load(at, mask=here, other=0.0))


@triton.jit
def _raw(rows, t, channel, here) -> tl.tensor:
    """Load the channels of the token t in their own dtype, which takes fewer registers."""
    at = rows[0] + t * rows[1] + channel.to(tl.int64) * rows[2]
    return tl.load(at, mask=here, other=0.0)


@triton.jit
def fetch(rows, first, length, step, channels, heres, STEPS: tl.constexpr) -> tuple[Any, ...]:
    """Load the channels of some tensors at STEPS tokens; past the ends the nearest token's.

    Returns:
        For each token, for each tensor of `rows`, one of each row of channels.
    """
    loaded = ()
    for i in tl.static_range(STEPS):
        t = tl.minimum(tl.maximum(first + i, 0), length - 1) * step
        for k in tl.static_range(len(rows)):
            for r in tl.static_range(len(channels)):
                loaded = loaded + (_raw(rows[k], t, channels[r], heres[r]),)
    return loaded


@triton.jit
def parts_of(
    rows, first, length, step,
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    STATE: tl.constexpr,
) -> tuple[Any, ...]:  # fmt: skip
    """Load B or C at STEPS tokens, all parts of each."""
    loaded = ()
    for i in tl.static_range(STEPS):
        t = tl.minimum(first + i, length - 1) * step
        for p in tl.static_range(PARTS):
            loaded = loaded + (token_part(rows, t, p, PART, STATE),)
    return loaded


@triton.jit
def put_token(rows, t, channel, here, value) -> None:
    """Store the channels of the token t in the dtype of the rows."""
    at = rows[0] + t * rows[1] + channel.to(tl.int64) * rows[2]
    tl.store(at, value.to(rows[0].dtype.element_ty), mask=here)
