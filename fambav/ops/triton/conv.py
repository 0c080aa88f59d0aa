"""Causal depthwise convolutions of both directions, as Triton kernels.

    forward   u[t] = act(bias + sum over k of w[k] x[t - width + 1 + k])
    reverse   u[t] = act(bias + sum over k of w[k] x[t + width - 1 - k])

A program loops over a stretch of tokens for a block of channels, with a sliding window of tokens in
registers.  The `width` tokens up to token s are the receptive field of the forward direction at s
and of the reverse one at s - width + 1, so one window serves both and x is loaded once.  The
backward kernel keeps a window of pre-activation gradients in the same way: each is computed once,
not once per tap.

SASS instructions of the loop (sm_90, Triton 3.7) per element of x at width 4, both directions,
silu, bfloat16: about 29 forward and 65 backward.
"""

# mypy: disable-error-code="assignment"
# (the type of a tuple changes with every assignment that extends it)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fambav.ops.triton.gate import sigmoid
from fambav.ops.triton.launch import OPTIONS, POINTERS, on_device
from fambav.ops.triton.variant import Variant

ROWS = 4  # tokens whose loads are issued together
MOST_STEPS, FEWEST_STEPS = 256, 16  # of a stretch
WARPS = 1  # of a program
ENOUGH_PROGRAMS = 1024  # to fill a large GPU; stretches are halved down to FEWEST_STEPS for it


@triton.jit
def _place(
    length,
    dim,
    stretch,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Index of the stretch, sample, first step, end, and channels.

    At step s the newest token of the window is s; the reverse direction takes width - 1 more steps
    after the last token.
    """
    steps = length + WIDTH - 1
    blocks = tl.cdiv(dim, BLOCK)
    stretches = tl.cdiv(steps, stretch)
    place = tl.program_id(0)
    row = place // blocks
    first = (row % stretches) * stretch
    channel = (place % blocks) * BLOCK + tl.arange(0, BLOCK)
    batch = (row // stretches).to(tl.int64)
    return row.to(tl.int64), batch, first, tl.minimum(first + stretch, steps), channel.to(tl.int64)


@triton.jit
def _exists(token, length, inside):
    """Mask of the channels `inside`, empty unless 0 <= token < length.

    The interpreter of Triton 3.9 does not support `&` of a block and a scalar.
    """
    return tl.where((token >= 0) & (token < length), x=inside, y=False)


@triton.jit
def _token(place, token, length, inside):
    """Load one token; zeros outside of the sequence."""
    here = _exists(token, length, inside)
    return tl.load(place, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _taps(
    weight,
    channel,
    inside,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Load the weights of a direction in token order."""
    taps = ()
    for i in tl.static_range(WIDTH):
        k = WIDTH - 1 - i if REVERSE else i
        tap = tl.load(weight + channel * WIDTH + k, mask=inside, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def _shift(bias, channel, inside, BLOCK: tl.constexpr):
    if bias is None:
        shift = tl.zeros([BLOCK], tl.float32)
    else:
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return shift


@triton.jit
def _before(shift, taps, seen):
    """Pre-activation: `shift` + `taps` . `seen`."""
    for j in tl.static_range(len(taps)):
        shift += taps[j] * seen[j]
    return shift


@triton.jit
def _pull(
    du,
    shift,
    taps,
    seen,
    SILU: tl.constexpr,
):
    """Gradient of the pre-activation."""
    if SILU:
        before = _before(shift, taps, seen)
        gate = sigmoid(before)
        du *= gate * (1.0 + before * (1.0 - gate))
    return du


@triton.jit(do_not_specialize=["length", "stretch"])
def _conv_forward_kernel(
    x,
    weight_0,
    weight_1,
    bias_0,
    bias_1,
    u,
    length,
    dim,
    stretch,
    x_batch,
    x_token,
    x_channel,
    u_direction,
    u_batch,
    u_token,
    u_channel,
    WIDTH: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, batch, first, end, channel = _place(length, dim, stretch, WIDTH, BLOCK)
    inside = channel < dim
    taps = ()
    shifts = ()
    for k in tl.static_range(DIRECTIONS):
        weight = weight_1 if k else weight_0
        bias = bias_1 if k else bias_0
        taps = taps + (_taps(weight, channel, inside, WIDTH, (REVERSE >> k) & 1),)
        shifts = shifts + (_shift(bias, channel, inside, BLOCK),)
    x += batch * x_batch + first.to(tl.int64) * x_token + channel * x_channel
    u += batch * u_batch + first.to(tl.int64) * u_token + channel * u_channel
    seen = ()
    for i in tl.static_range(1 - WIDTH, 0):
        seen = seen + (_token(x + i * x_token, first + i, length, inside),)
    for step in range(first, end, ROWS):
        for i in tl.static_range(ROWS):
            seen = seen + (_token(x + i * x_token, step + i, length, inside),)
        for i in tl.static_range(ROWS):
            for k in tl.static_range(DIRECTIONS):
                back = WIDTH - 1 if (REVERSE >> k) & 1 else 0
                value = _before(shifts[k], taps[k], seen[i : i + WIDTH])
                if SILU:
                    value *= sigmoid(value)
                token = step + i - back
                here = _exists(token, length, inside)
                tl.store(u + k * u_direction + (i - back) * u_token, value, mask=here)
        seen = seen[ROWS:]
        x += ROWS * x_token
        u += ROWS * u_token


@triton.jit(do_not_specialize=["length", "stretch"])
def _conv_backward_kernel(
    du,
    x,
    weight_0,
    weight_1,
    bias_0,
    bias_1,
    dx,
    partial,
    length,
    dim,
    stretch,
    du_direction,
    du_batch,
    du_token,
    du_channel,
    x_batch,
    x_token,
    x_channel,
    dx_batch,
    dx_token,
    dx_channel,
    partial_direction,
    partial_row,
    WIDTH: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, batch, first, end, channel = _place(length, dim, stretch, WIDTH, BLOCK)
    inside = channel < dim
    zero = tl.zeros([BLOCK], tl.float32)
    taps = ()
    shifts = ()
    sums = ()  # of each direction: width gradients of the taps, then that of the bias
    for k in tl.static_range(DIRECTIONS):
        weight = weight_1 if k else weight_0
        bias = bias_1 if k else bias_0
        taps = taps + (_taps(weight, channel, inside, WIDTH, (REVERSE >> k) & 1),)
        shifts = shifts + (_shift(bias, channel, inside, BLOCK),)
        for _ in tl.static_range(WIDTH + 1):
            sums = sums + (zero,)
    du += batch * du_batch + first.to(tl.int64) * du_token + channel * du_channel
    x += batch * x_batch + first.to(tl.int64) * x_token + channel * x_channel
    dx += batch * dx_batch + first.to(tl.int64) * dx_token + channel * dx_channel
    # The window before the first step: another program accumulates its part of the sums.
    seen = ()
    for i in tl.static_range(2 - 2 * WIDTH, 0):
        seen = seen + (_token(x + i * x_token, first + i, length, inside),)
    pulls = ()  # of each step: one for each direction
    for i in tl.static_range(WIDTH - 1):
        for k in tl.static_range(DIRECTIONS):
            at = i - (2 * WIDTH - 2 if (REVERSE >> k) & 1 else WIDTH - 1)
            early = _token(du + k * du_direction + at * du_token, first + at, length, inside)
            pulls = pulls + (_pull(early, shifts[k], taps[k], seen[i : i + WIDTH], SILU),)
    seen = seen[WIDTH - 1 :]
    for step in range(first, end, ROWS):
        given = ()
        for i in tl.static_range(ROWS):
            seen = seen + (_token(x + i * x_token, step + i, length, inside),)
            for k in tl.static_range(DIRECTIONS):
                at = i - (WIDTH - 1 if (REVERSE >> k) & 1 else 0)
                place = du + k * du_direction + at * du_token
                given = given + (_token(place, step + at, length, inside),)
        for i in tl.static_range(ROWS):
            value = zero
            grown = ()
            for k in tl.static_range(DIRECTIONS):
                window = seen[i : i + WIDTH]
                pull = _pull(given[i * DIRECTIONS + k], shifts[k], taps[k], window, SILU)
                pulls = pulls + (pull,)
                for j in tl.static_range(WIDTH):
                    value += taps[k][j] * pulls[(i + WIDTH - 1 - j) * DIRECTIONS + k]
                    grown = grown + (sums[k * (WIDTH + 1) + j] + pull * window[j],)
                grown = grown + (sums[k * (WIDTH + 1) + WIDTH] + pull,)
            sums = grown
            at = i - WIDTH + 1
            here = _exists(step + at, length, inside)
            tl.store(dx + at * dx_token, value, mask=here)
        seen = seen[ROWS:]
        pulls = pulls[ROWS * DIRECTIONS :]
        du += ROWS * du_token
        x += ROWS * x_token
        dx += ROWS * dx_token
    for k in tl.static_range(DIRECTIONS):
        place = partial + k * partial_direction + row * partial_row
        for j in tl.static_range(WIDTH):
            tap = WIDTH - 1 - j if (REVERSE >> k) & 1 else j
            tl.store(place + channel * WIDTH + tap, sums[k * (WIDTH + 1) + j], mask=inside)
        tl.store(place + dim * WIDTH + channel, sums[k * (WIDTH + 1) + WIDTH], mask=inside)


def conv_forward(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    u: Tensor,
    *,
    silu: bool,
    reverse: Sequence[bool],
) -> None:
    """Convolve the tokens in one or two directions.

    Args:
        x: Input, (batch, length, dim), any strides.
        weight: Kernels of each direction, (dim, width).
        bias: Of each direction, (dim,), or None.
        u: Output for the result, (directions, batch, length, dim), any strides.
        silu: Apply silu to the result.
        reverse: Of each direction, whether it convolves over following tokens.
    """
    form = _form(x.shape[2], weight[0].shape[1], reverse, silu=silu, channels=128)
    stretch, rows = _stretches(x.shape, form)
    taps = [w.contiguous() for w in weight]
    shifts = [None] if bias is None else [b.contiguous() for b in bias]
    with on_device(x):
        _conv_forward_kernel[(rows * triton.cdiv(x.shape[2], form["BLOCK"]),)](
            x, taps[0], taps[-1], shifts[0], shifts[-1], u, *x.shape[1:], stretch,
            *x.stride(), *u.stride(), **form, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip


def conv_backward(
    du: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    dx: Tensor,
    *,
    silu: bool,
    reverse: Sequence[bool],
    partial: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the weights and biases; write that of x.

    Args:
        du: Gradient of u, (directions, batch, length, dim), any strides.
        x: As in `conv_forward`, like weight, bias, silu and reverse.
        weight: (dim, width) for each direction.
        bias: (dim,) for each direction, or None.
        dx: Output for the gradient of x, (batch, length, dim), any strides.
        silu: Whether silu was applied.
        reverse: Of each direction.
        partial: Leave the parts that make up both gradients to the caller to sum.

    Returns:
        dweight, (directions, dim, width), and dbias, (directions, dim), or None; both float32.  The
        order of the sums depends on shapes alone.  With `partial` parts are the second axis.
    """
    directions, _, _, dim = du.shape
    width = weight[0].shape[1]
    form = _form(dim, width, reverse, silu=silu, channels=64)
    stretch, rows = _stretches(x.shape, form)
    taps = [w.contiguous() for w in weight]
    shifts = [None] if bias is None else [b.contiguous() for b in bias]
    parts = x.new_empty(directions, rows, dim * (width + 1), dtype=torch.float32)
    with on_device(x):
        _conv_backward_kernel[(rows * triton.cdiv(dim, form["BLOCK"]),)](
            du, x, taps[0], taps[-1], shifts[0], shifts[-1], dx, parts, *x.shape[1:], stretch,
            *du.stride(), *x.stride(), *dx.stride(), *parts.stride()[:2],
            **form, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    sums = parts if partial else parts.sum(dim=1)
    dweight, dbias = sums.split([dim * width, dim], dim=-1)
    return dweight.unflatten(-1, (dim, width)), None if bias is None else dbias


def _form(
    dim: int, width: int, reverse: Sequence[bool], *, silu: bool, channels: int
) -> dict[str, Any]:
    """Return the constants of a specialization; `channels` is the widest block that is fast."""
    return dict(
        WIDTH=width,
        DIRECTIONS=len(reverse),
        REVERSE=sum(back << k for k, back in enumerate(reverse)),
        SILU=silu,
        ROWS=ROWS,
        BLOCK=64 if dim % channels else channels,
    )


def _stretches(shape: Sequence[int], form: dict[str, Any]) -> tuple[int, int]:
    """Return the steps of a program and the number of stretches of all samples.

    Long stretches amortize loading weights and the first window; short ones fill the GPU.
    """
    batch, length, dim = shape
    steps, blocks = length + form["WIDTH"] - 1, triton.cdiv(dim, form["BLOCK"])
    most = MOST_STEPS
    while most > FEWEST_STEPS and batch * blocks * triton.cdiv(steps, most) < ENOUGH_PROGRAMS:
        most //= 2
    even = triton.cdiv(steps, triton.cdiv(steps, most))
    stretch = triton.cdiv(even, ROWS) * ROWS
    return stretch, batch * triton.cdiv(steps, stretch)


def variants() -> Iterator[Variant]:
    """Yield the usual specializations: dim a multiple of 64, channels contiguous."""
    ways: list[tuple[bool, ...]] = [(False,), (True,), (False, True)]
    cases = [(4, dim, way) for way in ways for dim in (64, 128)]
    cases += [(width, 128, ways[-1]) for width in (2, 3)]
    for dtype in POINTERS:
        for width, dim, way in cases:
            forward = _form(dim, width, way, silu=True, channels=128)
            yield _variant(_conv_forward_kernel, dtype, forward)
            if dim == 128:
                backward = _form(dim, width, way, silu=True, channels=64)
                yield _variant(_conv_backward_kernel, dtype, backward)


def _variant(kernel: Any, dtype: torch.dtype, form: dict[str, Any]) -> Variant:
    """Describe a specialization with float32 weights and biases."""
    arguments = [name for name in kernel.arg_names if name not in form]
    activations = ("x", "u", "du", "dx")
    types = dict.fromkeys(arguments, "i32")
    types |= {name: POINTERS[dtype] for name in arguments if name in activations}
    weights = ("weight_0", "weight_1", "bias_0", "bias_1", "partial")
    types |= {name: "*fp32" for name in arguments if name in weights}
    way = "both" if form["DIRECTIONS"] == 2 else ("forward", "reverse")[form["REVERSE"]]
    what = f"{way} {POINTERS[dtype][1:]} W{form['WIDTH']} BD{form['BLOCK']}"
    return Variant(
        name=f"{kernel.__name__.strip('_')} {what}",
        kernel=kernel,
        types=types,
        constants=form,
        warps=WARPS,
        aligned=tuple(n for n in arguments if n not in ("length", "stretch")),
        ones=tuple(n for n in arguments if n.endswith("_channel")),
        loop_work=(ROWS * form["BLOCK"],),
    )
