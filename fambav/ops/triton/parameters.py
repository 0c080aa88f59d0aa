"""Parameters of a mixer packed, and their gradients finished, as one Triton kernel each.

A layer of a small model is short against the launch of a kernel: what PyTorch does in thirty
launches, each for a few hundred kilobytes, are sections of the two grids here.  See
`mixer_parameters` for what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fambav.ops.mixer_parameters import Packed, Parts, row_width
from fambav.ops.triton.launch import OPTIONS, POINTERS, on_device
from fambav.ops.triton.variant import Variant

BLOCK = 512  # elements of a program that packs
COLUMNS, PARTS = 128, 16  # elements of a program that sums, and the parts it loads at once
WARPS = 4


@triton.jit
def _pack_kernel(
    x_0, x_1, dt_0, dt_1, A_0, A_1, out_proj, x_packed, dt_packed, A_packed, out_packed,
    dim, rank, outputs,
    STATE: tl.constexpr,
    ROW: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    direction = tl.program_id(1)
    place = tl.program_id(0)
    x_tiles = tl.cdiv(ROW * dim, BLOCK)
    dt_tiles = tl.cdiv((ROW - 2 * STATE) * dim, BLOCK)
    A_tiles = tl.cdiv(STATE * dim, BLOCK)
    if place < x_tiles:
        at = place * BLOCK + tl.arange(0, BLOCK)
        row = at // dim
        source = tl.where(row < 2 * STATE, row + rank, row - 2 * STATE)
        used = row < 2 * STATE + rank
        value = tl.load(
            tl.where(direction == 0, x_0, x_1) + source * dim + at % dim, mask=used, other=0.0
        )
        tl.store(x_packed + direction * ROW * dim + at, value, mask=row < ROW)
    elif place < x_tiles + dt_tiles:
        at = (place - x_tiles) * BLOCK + tl.arange(0, BLOCK)
        channel, column = at // (ROW - 2 * STATE), at % (ROW - 2 * STATE)
        value = tl.load(
            tl.where(direction == 0, dt_0, dt_1) + channel * rank + column,
            mask=(channel < dim) & (column < rank),
            other=0.0,
        )
        tl.store(dt_packed + direction * (ROW - 2 * STATE) * dim + at, value, mask=channel < dim)
    elif place < x_tiles + dt_tiles + A_tiles:
        at = (place - x_tiles - dt_tiles) * BLOCK + tl.arange(0, BLOCK)
        inside = at < STATE * dim
        value = tl.load(tl.where(direction == 0, A_0, A_1) + at, mask=inside, other=0.0)
        value = value.to(tl.float32)
        if LOG:
            value = -tl.exp(value)
        tl.store(A_packed + direction * STATE * dim + at, value, mask=inside)
    elif out_proj is not None:
        at = (place - x_tiles - dt_tiles - A_tiles) * BLOCK + tl.arange(0, BLOCK)
        inside = (at < outputs * dim) & (direction == 0)
        tl.store(out_packed + at, tl.load(out_proj + at, mask=inside, other=0.0), mask=inside)


def _empty_packed(
    x_proj: Sequence[Tensor], A: Sequence[Tensor], out_proj: Tensor | None, dtype: torch.dtype
) -> Packed:
    """Return memory for packed parameters; without a copy of out_proj where it needs none."""
    (width, dim), state = x_proj[0].shape, A[0].shape[1]
    row = row_width(width - 2 * state, state)
    new = x_proj[0].new_empty
    if out_proj is not None and (out_proj.dtype != dtype or not out_proj.is_contiguous()):
        out_proj = new(out_proj.shape, dtype=dtype)
    return Packed(
        x_proj=new(2, row, dim, dtype=dtype),
        dt_proj=new(2, dim, row - 2 * state, dtype=dtype),
        A=new(2, dim, state, dtype=torch.float32),
        out_proj=out_proj,
    )


def pack_parameters(
    x_proj: Sequence[Tensor],
    dt_proj: Sequence[Tensor],
    A: Sequence[Tensor],
    out_proj: Tensor | None,
    *,
    dtype: torch.dtype,
    log_A: bool,
) -> Packed:
    """Reorder, pad and cast; arguments as of `mixer_parameters.pack_parameters`."""
    packed = _empty_packed(x_proj, A, out_proj, dtype)
    (dim, rank), state, row = dt_proj[0].shape, A[0].shape[1], packed.x_proj.shape[1]
    copied = None if packed.out_proj is out_proj else out_proj
    outputs = 0 if copied is None else len(copied)
    sizes = (row * dim, (row - 2 * state) * dim, state * dim, outputs * dim)
    each = (x.contiguous() for pair in (x_proj, dt_proj, A) for x in pair)
    with on_device(packed.A):
        _pack_kernel[(sum(triton.cdiv(n, BLOCK) for n in sizes), 2)](
            *each, None if copied is None else copied.contiguous(),
            *packed[:3], None if copied is None else packed.out_proj,
            dim, rank, outputs, STATE=state, ROW=row, LOG=log_A, BLOCK=BLOCK,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return packed


@triton.jit
def _sum(part, at, inside, rows, stride, PARTS: tl.constexpr) -> tl.tensor:
    """Sum the elements at these offsets over rows of parts, in their order by PARTS."""
    total = tl.zeros([PARTS, at.shape[0]], tl.float32)
    for first in range(0, rows, PARTS):
        row = first + tl.arange(0, PARTS)
        here = (row < rows)[:, None] & inside[None, :]
        offset = row.to(tl.int64)[:, None] * stride + at[None, :]
        total += tl.load(part + offset, mask=here, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _section(
    part, out, place, direction, size, rows, stride, PARTS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """Sum what keeps its order; the parts of a direction follow those of the other."""
    at = place * COLUMNS + tl.arange(0, COLUMNS)
    part += direction.to(tl.int64) * rows * stride
    total = _sum(part, at, at < size, rows, stride, PARTS)
    tl.store(out + direction * size + at, total, mask=at < size)


@triton.jit(do_not_specialize=["taps_rows", "x_rows", "images"])
def _finish_kernel(
    taps, shifts, x_proj, dt_proj, dt_bias, A, D, rate,
    dtaps, dshifts, dx_proj, ddt_proj, ddt_bias, dA, dD,
    dim, rank, taps_rows, taps_stride, x_rows, images,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
    ROW: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    direction, place = tl.program_id(1), tl.program_id(0)
    wide = tl.cdiv(dim, COLUMNS)  # programs for one number of each channel
    if place < wide * WIDTH:
        _section(taps, dtaps, place, direction, dim * WIDTH, taps_rows, taps_stride, PARTS, COLUMNS)
    elif place < wide * (WIDTH + 1):
        place -= wide * WIDTH
        _section(shifts, dshifts, place, direction, dim, taps_rows, taps_stride, PARTS, COLUMNS)
    elif place < wide * (WIDTH + 2):
        place -= wide * (WIDTH + 1)
        _section(dt_bias, ddt_bias, place, direction, dim, images, dim, PARTS, COLUMNS)
    elif place < wide * (WIDTH + 3):
        place -= wide * (WIDTH + 2)
        _section(D, dD, place, direction, dim, images, dim, PARTS, COLUMNS)
    elif place < wide * (WIDTH + 3 + STATE):
        at = (place - wide * (WIDTH + 3)) * COLUMNS + tl.arange(0, COLUMNS)
        size = dim * STATE
        inside = at < size
        A += direction.to(tl.int64) * images * size
        total = _sum(A, at, inside, images, size, PARTS)
        if rate is not None:  # A is minus the exponential of the parameter
            total *= tl.load(rate + direction * size + at, mask=inside, other=0.0)
        tl.store(dA + direction * size + at, total, mask=inside)
    elif place < wide * (WIDTH + 3 + STATE + ROW):
        at = (place - wide * (WIDTH + 3 + STATE)) * COLUMNS + tl.arange(0, COLUMNS)
        row = at // dim  # of dt, B and C, from B, C and dt
        inside = row < rank + 2 * STATE
        source = tl.where(row < rank, row + 2 * STATE, row - rank) * dim + at % dim
        x_proj += direction.to(tl.int64) * x_rows * ROW * dim
        total = _sum(x_proj, source, inside, x_rows, ROW * dim, PARTS)
        tl.store(dx_proj + direction * (rank + 2 * STATE) * dim + at, total, mask=inside)
    else:
        at = (place - wide * (WIDTH + 3 + STATE + ROW)) * COLUMNS + tl.arange(0, COLUMNS)
        channel, column = at // rank, at % rank
        inside = channel < dim
        dt_proj += direction.to(tl.int64) * x_rows * (ROW - 2 * STATE) * dim
        source = channel * (ROW - 2 * STATE) + column
        total = _sum(dt_proj, source, inside, x_rows, (ROW - 2 * STATE) * dim, PARTS)
        tl.store(ddt_proj + direction * dim * rank + at, total, mask=inside)


def finish_gradients(
    parts: Parts, A: Tensor | None, *, rank: int, dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Sum and reorder; arguments and results as of `mixer_parameters.finish_gradients`.

    Those of the convolution are slices of one tensor, as `conv_backward` returns them; all others
    are contiguous.
    """
    dim, width = parts.conv_weight.shape[2:]
    state, row, rows = parts.A.shape[3], parts.x_proj.shape[2], parts.conv_weight.shape[1]
    shapes = [list(part.shape[2:]) for part in parts]
    shapes[2], shapes[3] = [rank + 2 * state, dim], [dim, rank]
    grads = [
        parts.A.new_empty(2, *shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    programs = triton.cdiv(dim, COLUMNS) * (width + 3 + state + row + rank)
    with on_device(parts.A):
        _finish_kernel[(programs, 2)](
            *parts, A, *grads, dim, rank, rows, parts.conv_weight.stride(1), parts.x_proj.shape[1],
            parts.A.shape[1], WIDTH=width, STATE=state, ROW=row, PARTS=PARTS, COLUMNS=COLUMNS,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return grads


def variants() -> Iterator[Variant]:
    """Yield the usual specializations: float32 parameters of the published widths."""
    for dtype in (torch.float32, torch.bfloat16):
        name, pointer = POINTERS[dtype][1:], POINTERS[dtype]
        form = dict(STATE=16, ROW=48, LOG=True, BLOCK=BLOCK)
        low = ("x_packed", "dt_packed", "out_packed")
        absent = dict(out_proj=None, out_packed=None) if dtype == torch.float32 else {}
        yield _variant(f"pack {name}", _pack_kernel, form | absent, dict.fromkeys(low, pointer))
        form = dict(WIDTH=4, STATE=16, ROW=48, PARTS=PARTS, COLUMNS=COLUMNS)
        parts = dict.fromkeys(("x_proj", "dt_proj"), pointer)
        yield _variant(f"finish {name}", _finish_kernel, form, parts)


def _variant(name: str, kernel: Any, form: dict[str, Any], low: dict[str, str]) -> Variant:
    arguments = [argument for argument in kernel.arg_names if argument not in form]
    numbers = ("dim", "rank", "outputs", "taps_rows", "taps_stride", "x_rows", "images")
    types = dict.fromkeys(arguments, "*fp32") | low
    types |= {argument: "i32" for argument in arguments if argument in numbers}
    loose = ("rank", "taps_rows", "x_rows", "images")
    aligned = tuple(argument for argument in arguments if argument not in loose)
    return Variant(f"parameters {name}", kernel, types, form, WARPS, aligned)
