"""Selective scans of both directions, as a Triton kernel.

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] h[t] + D u[t]

The step sizes of tokens that were removed in front of a token add to its own in the exponent alone.

A program loops over all tokens of a sample in one direction, with the state of a block of channels
in registers.  A thread owns the whole state of its channels: reductions over the state stay within
the thread, softplus is computed once per delta, and B and C of the token, which all threads need,
are loaded as short vectors.  The state is therefore one tensor (channels, PART) per PART elements,
since the compiler gives a thread as many neighbours of a row as a 16-byte load brings.

A pass takes two tokens.  Their u and delta were loaded in the pass before, since one warp of each
program has nothing else to do while it waits; B and C, which the programs of a sample share, are
loaded at its start.

The state is kept for the backward pass every CHUNK tokens: the scratch of one chunk, over all
programs resident on an H200, is 26 MB and fits in its L2 cache; that of 32 tokens would not.

Issue slots per 32 state-steps in SASS (sm_90, Triton 3.7) at state 16 with softplus, bias and D:
9.9 in bfloat16 with two channels per thread.
"""

# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fambav.ops.kept_states import TRITON_CHUNK as CHUNK
from fambav.ops.kept_states import kept_dtype, state_parts, triton_shape
from fambav.ops.triton.launch import OPTIONS, POINTERS, on_device
from fambav.ops.triton.scan_tokens import (
    LOG2_E,
    fetch,
    gap_of,
    of_channels,
    only_if,
    parts_of,
    put_token,
    rows_of_gaps,
    step_size,
    upcast,
)
from fambav.ops.triton.variant import Variant

LANES = 32  # threads of a warp, each of which owns one channel of a tensor
STEPS = 2  # tokens of a pass; must divide CHUNK
ENOUGH_PROGRAMS = 1024  # eight warps per multiprocessor of a large GPU

# Registers per thread (maxnreg) with two channels each and 16 states: the compiler alone stops at
# 128 and spills 16 bytes on sm_80.  With 144 fourteen warps fit into a multiprocessor, with 168
# twelve, as many as a step of Vim-Ti at batch 128 has.
REGISTERS, GAP_REGISTERS = 144, 168

SIZES = ("length", "size", "groups", "blocks", "images", "reverse")  # not specialized on

GAPS = ("bias", "self", "hold_prev", "cached")  # that age the state
MEASURED = (torch.float32, torch.bfloat16)  # in which models train
AUDITED = ((torch.float32, GAPS[0]), (torch.bfloat16, GAPS[0]))  # the default one
NO_GAP: dict[str, Any] = dict(skipped=None, skipped_dt=None)


@triton.jit(
    do_not_specialize=[
        *SIZES,
        *("u_direction", "u_batch", "u_token"),
        *("delta_direction", "delta_batch", "delta_token"),
        *("y_direction", "y_batch", "y_token"),
    ]
)
def _scan_forward_kernel(
    u, delta, A_0, A_1, B, C, D_0, D_1, bias_0, bias_1, skipped, skipped_dt, y, last, kept, dt,
    length, size, groups, blocks, images, reverse,
    u_direction, u_batch, u_token, u_channel,
    delta_direction, delta_batch, delta_token, delta_channel,
    B_direction, B_batch, B_token, B_group, B_state,
    C_direction, C_batch, C_token, C_group, C_state,
    y_direction, y_batch, y_token, y_channel,
    STATE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SOFTPLUS: tl.constexpr, GAP: tl.constexpr, KEEP: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    direction = tl.program_id(1).to(tl.int64)
    image = (place // (blocks * groups)).to(tl.int64)
    group = place // blocks % groups
    number = tl.arange(0, PART)[None, :]
    dim = size * groups
    row = direction * images + image
    back = (reverse >> tl.program_id(1)) & 1
    first = (back * (length - 1)).to(tl.int64)
    step = (1 - 2 * back).to(INDEX)

    channels = ()  # of each row, like all that follow
    heres = ()
    decays = ()
    shifts = ()
    skips = ()
    rests = ()
    h = ()
    for r in tl.static_range(ROWS):
        in_group = (place % blocks * ROWS + r) * BLOCK + tl.arange(0, BLOCK)[:, None]
        here = in_group < size
        channel = group * size + in_group
        for p in tl.static_range(PARTS):
            inside = here & (p * PART + number < STATE)
            at = channel * STATE + p * PART + number
            rate = of_channels(A_0, A_1, direction, at, inside)
            decays = decays + (rate * LOG2_E,)
            h = h + (tl.zeros([BLOCK, PART], tl.float32),)
        channels = channels + (channel,)
        heres = heres + (here,)
        shifts = shifts + (of_channels(bias_0, bias_1, direction, channel, here),)
        skips = skips + (of_channels(D_0, D_1, direction, channel, here),)
        if GAP == "bias" or GAP == "hold_prev":
            rest, _ = step_size(shifts[r], 0.0, SOFTPLUS)
            rests = rests + (rest,)

    u += direction * u_direction + image * u_batch + first * u_token
    delta += direction * delta_direction + image * delta_batch + first * delta_token
    B += direction * B_direction + image * B_batch + group * B_group + first * B_token
    C += direction * C_direction + image * C_batch + group * C_group + first * C_token
    y += direction * y_direction + image * y_batch + first * y_token
    kept += row * ((length - 1) // CHUNK) * PARTS * PART * dim + number
    u_rows, delta_rows = (u, u_token, u_channel), (delta, delta_token, delta_channel)
    B_rows, C_rows = (B, B_token, B_state), (C, C_token, C_state)
    y_rows = (y, y_token, y_channel)
    gap_rows = rows_of_gaps(skipped, skipped_dt, row * length + first, dim, GAP)
    if dt is not None:
        dt += (row * length + first) * dim

    rows = (u_rows, delta_rows)
    ahead = fetch(rows, 0, length, step, channels, heres, STEPS)
    for start in range(0, length, CHUNK):
        for s in range(start, tl.minimum(start + CHUNK, length), STEPS):
            now = ahead
            B_t = parts_of(B_rows, s, length, step, STEPS, PARTS, PART, STATE)
            C_t = parts_of(C_rows, s, length, step, STEPS, PARTS, PART, STATE)
            ahead = fetch(rows, s + STEPS, length, step, channels, heres, STEPS)
            for i in tl.static_range(STEPS):
                real = s + i < length  # else the state stays
                t = tl.minimum(s + i, length - 1) * step
                grown = ()
                befores = ()
                for r in tl.static_range(ROWS):
                    here = only_if(real, heres[r])
                    u_t = upcast(now[2 * i * ROWS + r])
                    delta_t, _ = step_size(upcast(now[(2 * i + 1) * ROWS + r]), shifts[r], SOFTPLUS)
                    delta_t = tl.where(real, delta_t, 0.0)
                    if dt is not None:
                        at = dt + t * dim.to(tl.int64) + channels[r]
                        tl.store(at, delta_t, mask=here)
                    x = delta_t * u_t
                    aged = delta_t
                    if GAP != "none":
                        rest = delta_t
                        if GAP == "bias" or GAP == "hold_prev":
                            rest = rests[r]
                        gap = gap_of(
                            delta_t, rest, gap_rows, row, dim, t, channels[r], heres[r], GAP
                        )
                        aged += tl.where(real, gap, 0.0)
                        befores = befores + (delta_t,)
                    y_t = tl.zeros([BLOCK, PART], tl.float32)
                    for p in tl.static_range(PARTS):
                        decay = tl.exp2(aged * decays[r * PARTS + p])
                        h_p = decay * h[r * PARTS + p] + x * B_t[i * PARTS + p]
                        y_t += h_p * C_t[i * PARTS + p]
                        grown = grown + (h_p,)
                    y_t = tl.sum(y_t, axis=1, keep_dims=True) + skips[r] * u_t
                    put_token(y_rows, t, channels[r], here, y_t)
                h = grown
                if GAP == "hold_prev":
                    rests = befores
        if KEEP and start + CHUNK < length:
            for r in tl.static_range(ROWS):
                for p in tl.static_range(PARTS):
                    part = (start // CHUNK * PARTS + p) * dim.to(tl.int64) + channels[r]
                    tl.store(kept + part * PART, h[r * PARTS + p], mask=heres[r])

    for r in tl.static_range(ROWS):
        for p in tl.static_range(PARTS):
            state_number = p * PART + number
            to = last + (row * dim + channels[r]) * STATE + state_number
            tl.store(to, h[r * PARTS + p], mask=heres[r] & (state_number < STATE))


def scan_forward(  # noqa: D417  several in a line
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
    states_dtype: torch.dtype = torch.float32,
    block: int | None = None,
    warps: int | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Scan the tokens of every sample in one or two directions.

    Args:
        u, delta: Input; step size before bias and softplus; (directions, batch, length, dim).
        A, D, bias: (dim, state) and (dim,) of each direction, float32; D and bias may be None.
        B, C: Input and output matrix, (directions, batch, length, groups, state), any strides;
            fastest if the state is contiguous and all other strides are multiples of 16.
        y: Output for the result, shaped like u, any strides and float dtype.
        softplus, reverse, keep: Whether delta goes through softplus; whether each direction goes
            back; whether to keep the states that the backward pass needs.
        skipped, gap_policy: Number of tokens removed in front of each, (directions, batch, length);
            how the state ages over them, see `registry.GAP_POLICIES`.
        skipped_dt: Their step sizes, summed, shaped like u, under "cached"; fastest if contiguous.
        dt: Output for the step size after softplus, shaped like u, contiguous float32, or None.
        states_dtype, chunk: Of the kept states; tokens between them.
        block, warps: Channels and warps of a program.

    Returns:
        The last state, (directions, batch, dim, state), float32, and those that are kept, of
        `kept_states.triton_shape`, or an empty tensor.
    """
    (directions, batch, length, dim), (groups, state) = u.shape, B.shape[3:]
    last = u.new_empty(directions, batch, dim, state, dtype=torch.float32)
    shape = triton_shape(directions, batch, length, dim, state, chunk=chunk) if keep else (0,)
    kept, size = u.new_empty(shape, dtype=states_dtype), dim // groups
    block = block or fast_block(batch * directions * groups, size, state)
    warps, blocks = warps or 1, triton.cdiv(size, block)
    form = _form(state, block, warps, chunk, softplus=softplus, gap=gap_policy, keep=keep)
    with on_device(u):
        _scan_forward_kernel[(batch * groups * blocks, directions)](
            u, delta, *each_way(A), B, C, *each_way(D), *each_way(bias),
            *as_floats(skipped, skipped_dt), y, last, kept, dt,
            length, size, groups, blocks, batch, directions_back(reverse),
            *u.stride(), *delta.stride(), *B.stride(), *C.stride(), *y.stride(),
            **form, INDEX=index_type(length, u, delta, B, C, y),
            num_warps=warps, maxnreg=_registers(form), **OPTIONS,
        )  # fmt: skip
    return last, kept


def _form(
    state: int,
    block: int,
    warps: int,
    chunk: int = CHUNK,
    *,
    softplus: bool = True,
    gap: str = "none",
    keep: bool,
) -> dict[str, Any]:
    """Return the constants of a specialization, without the type of its offsets."""
    if chunk % STEPS:
        raise ValueError(f"chunk is {chunk}, expected a multiple of {STEPS}")
    rows = max(block // (LANES * warps), 1)
    form = state_form(state) | dict(CHUNK=chunk, STEPS=STEPS, BLOCK=block // rows, ROWS=rows)
    return form | dict(SOFTPLUS=softplus, GAP=gap, KEEP=keep)


def _registers(form: Mapping[str, Any]) -> int | None:
    """Return the limit of registers per thread (maxnreg), or None for no limit."""
    wide = form["ROWS"] > 1 and form["STATE"] == 16
    return (REGISTERS if form["GAP"] == "none" else GAP_REGISTERS) if wide else None


def as_floats(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    """Yield tensors about gaps as the kernels take them: contiguous, float32."""
    for tensor in tensors:
        yield None if tensor is None else tensor.float().contiguous()


def fast_block(walks: int, size: int, state: int) -> int:
    """Return the channels of a forward program.

    Two channels per thread share the loads of B and C, if programs still fill the GPU and registers
    suffice.

    Args:
        walks: Groups of channels of all samples in all directions.
        size: Channels of a group.
        state: State size of a channel.
    """
    enough = walks * triton.cdiv(size, 2 * LANES) >= ENOUGH_PROGRAMS
    return 2 * LANES if enough and size > LANES and state <= 16 else LANES


def each_way(tensors: Sequence[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Return contiguous parameters of both directions; those of a single direction twice."""
    if tensors is None:
        return None, None
    return tensors[0].contiguous(), tensors[-1].contiguous()


def directions_back(reverse: Sequence[bool]) -> int:
    """Return a bit mask of the directions that go backwards."""
    return sum(back << k for k, back in enumerate(reverse))


def state_form(state: int) -> dict[str, Any]:
    """Return the constants of how the state is split into parts."""
    part, parts = state_parts(state)
    return dict(STATE=state, PART=part, PARTS=parts)


def index_type(length: int, *tensors: Tensor) -> Any:
    """Return the integer type for offsets between any two tokens of a sample."""
    distance = length * max(abs(tensor.stride(2)) for tensor in tensors)
    return tl.int32 if distance < 2**31 else tl.int64


def variants() -> Iterator[Variant]:
    """Yield the specializations of the models: channels and state contiguous, state 1 and 16."""
    cases = [*product(POINTERS, (16,), (1, 2), (True,))]
    cases += [
        *product(MEASURED, (1,), (1, 2), (True,)),
        *product(MEASURED, (16,), (1, 2), (False,)),
    ]
    for dtype, state, rows, keep in cases:
        form = _form(state, LANES * rows, 1, keep=keep) | dict(INDEX=tl.int32, **NO_GAP, dt=None)
        what = f"{POINTERS[dtype][1:]} N{state} BD{LANES * rows}{' keep' if keep else ''}"
        work = (LANES * rows * state * STEPS,)
        made = variant(f"scan_forward {what}", _scan_forward_kernel, dtype, form, work)
        yield made._replace(registers=_registers(form))
    for dtype, gap in AUDITED:
        form = _form(16, 2 * LANES, 1, gap=gap, keep=True) | dict(INDEX=tl.int32)
        form |= absent(gap) | (dict(dt=None) if gap != "cached" else {})
        what = f"{POINTERS[dtype][1:]} N16 BD{2 * LANES} keep {gap}"
        work = (2 * LANES * 16 * STEPS,)
        made = variant(f"scan_forward {what}", _scan_forward_kernel, dtype, form, work)
        yield made._replace(registers=_registers(form))


def absent(gap: str) -> dict[str, None]:
    """Return which of `skipped` and `skipped_dt` a policy does without."""
    return {"skipped" if gap == "cached" else "skipped_dt": None}


def variant(
    name: str, kernel: Any, dtype: torch.dtype, form: dict[str, Any], work: tuple[int, ...]
) -> Variant:
    """Describe a specialization of a scan whose tokens have one dtype."""
    tokens = ("u", "delta", "B", "C", "y", "dy", "du", "ddelta")  # the gaps are float32
    numbers_of = [name for name in kernel.arg_names if name not in form]
    strided = [name for name in numbers_of if name.rpartition("_")[0] in tokens]
    types = dict.fromkeys(numbers_of, "*fp32") | {"kept": POINTERS[kept_dtype(dtype)]}
    types |= {name: POINTERS[dtype] for name in numbers_of if name in tokens}
    types |= dict.fromkeys((*strided, *SIZES), "i32")
    ones = tuple(name for name in strided if name.endswith(("_channel", "_state")))
    rows = ("_direction", "_batch", "_token", "_group")
    aligned = [name for name in strided if name.startswith(("B_", "C_")) and name.endswith(rows)]
    aligned += [name for name in numbers_of if types[name] != "i32"]
    return Variant(name, kernel, types, form, 1, tuple(aligned), ones, work)
