"""Weighted means of groups of tokens, as Triton kernels: one launch for both streams each way.

A program takes one kept token, finds the sources of its group in the list of targets, and sums them
in the order of the list.  In the backward pass it takes a few input tokens, each of which gathers
its share of the gradient of its group.  There are no atomics, so results are deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fambav.ops.triton.launch import OPTIONS, POINTERS, on_device
from fambav.ops.triton.variant import Variant

LISTED = 128  # targets that a program compares at once
WIDEST = 1024  # channels of a program
ROWS = 4  # tokens of a program in the backward pass


@triton.jit(do_not_specialize=["length", "kept", "count"])
def _pool_forward_kernel(
    x,
    residual,
    weight,
    size,
    keep,
    source,
    target,
    x_mean,
    residual_mean,
    size_sum,
    share,
    place,
    length,
    kept,
    count,
    dim,
    x_batch,
    x_token,
    x_channel,
    residual_batch,
    residual_token,
    residual_channel,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = (tl.program_id(0) // kept).to(tl.int64)
    new = tl.program_id(0) % kept
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < dim
    x += sample * x_batch + channel.to(tl.int64) * x_channel
    weight += sample * length
    size += sample * length
    share += sample * length
    place += sample * length
    source += sample * count
    target += sample * count

    old = tl.load(keep + row)
    x_sum = tl.load(x + old * x_token, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        residual += sample * residual_batch + channel.to(tl.int64) * residual_channel
        residual_sum = tl.load(residual + old * residual_token, mask=inside, other=0.0)
        residual_sum = residual_sum.to(tl.float32)
    own = tl.load(weight + old)
    total = own
    patches = tl.load(size + old)
    for start in range(0, count, LISTED):
        i = start + tl.arange(0, LISTED)
        joins = tl.load(target + i, mask=i < count, other=-1) == old
        token = tl.load(source + i, mask=joins, other=0)
        total += tl.sum(tl.load(weight + token, mask=joins, other=0.0), axis=0)
        patches += tl.sum(tl.load(size + token, mask=joins, other=0.0), axis=0)
    part = tl.div_rn(own, total)
    tl.store(size_sum + row, patches)
    tl.store(share + old, part)
    tl.store(place + old, new)

    x_sum *= part
    if residual is not None:
        residual_sum *= part
    for start in range(0, count, LISTED):
        i = start + tl.arange(0, LISTED)
        joins = tl.load(target + i, mask=i < count, other=-1) == old
        token = tl.load(source + i, mask=joins, other=0)
        parts = tl.div_rn(tl.load(weight + token, mask=joins, other=0.0), total)
        tl.store(share + token, parts, mask=joins)
        tl.store(place + token, new, mask=joins)
        for _ in range(tl.sum(joins.to(tl.int32), axis=0)):
            following = tl.min(tl.where(joins, i, count), axis=0)
            joins = joins & (i != following)
            here = tl.load(source + following)
            part = tl.div_rn(tl.load(weight + here), total)
            x_sum += part * tl.load(x + here * x_token, mask=inside, other=0.0).to(tl.float32)
            if residual is not None:
                other = tl.load(residual + here * residual_token, mask=inside, other=0.0)
                residual_sum += part * other.to(tl.float32)
    tl.store(x_mean + row * dim + channel, x_sum, mask=inside)
    if residual is not None:
        tl.store(residual_mean + row * dim + channel, residual_sum, mask=inside)


@triton.jit
def _spread(grad, out, row, sample, group, part, channel, inside, dim, batch, token, channels):
    """Store each token's share of the gradient of its group."""
    at = (sample * batch + group * token)[:, None] + channel[None, :] * channels
    pull = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * part[:, None]
    tl.store(out + row[:, None] * dim + channel[None, :], pull, mask=inside)


@triton.jit(do_not_specialize=["tokens", "length"])
def _pool_backward_kernel(
    first,
    second,
    first_out,
    second_out,
    share,
    place,
    tokens,
    length,
    dim,
    first_batch,
    first_token,
    first_channel,
    second_batch,
    second_token,
    second_channel,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (row < tokens)[:, None] & (channel < dim)[None, :]
    sample = (row // length).to(tl.int64)
    group = tl.load(place + row, mask=row < tokens, other=0)
    part = tl.load(share + row, mask=row < tokens, other=0.0)
    given = (row.to(tl.int64), sample, group, part, channel, inside, dim)
    _spread(first, first_out, *given, first_batch, first_token, first_channel)
    if second is not None:
        _spread(second, second_out, *given, second_batch, second_token, second_channel)


def pool_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    size: Tensor,
    keep: Tensor,
    source: Tensor,
    target: Tensor,
) -> tuple[Tensor, ...]:
    """Average both streams over groups of tokens.

    Args:
        x: (batch, length, dim), any strides.
        residual: Shaped like x, any strides and dtype; None for none.
        weight: Of each token in its group, (batch, length), float32.
        size: To be summed, (batch, length), float32.
        keep: Kept token of each group, (batch, kept), int64.
        source: Tokens merged into others, (batch, count), int64.
        target: Kept tokens that they are merged into, (batch, count), int64.

    Returns:
        Means of x and of residual (empty without one) and sums of size, (batch, kept, ...), and
        share, float32, and group, int64, of every input token, (batch, length).
    """
    (batch, length, dim), kept = x.shape, keep.shape[1]
    mean = x.new_empty(batch, kept, dim)
    other = x.new_empty(0) if residual is None else residual.new_empty(batch, kept, dim)
    sums = size.new_empty(batch, kept)
    share, place = size.new_empty(batch, length), keep.new_empty(batch, length)
    inputs = (t.contiguous() for t in (weight, size, keep, source, target))
    strides = (*x.stride(), *((0, 0, 0) if residual is None else residual.stride()))
    block, warps = _channels(dim)
    with on_device(x):
        _pool_forward_kernel[(batch * kept, triton.cdiv(dim, block))](
            x, residual, *inputs, mean, None if residual is None else other, sums, share, place,
            length, kept, source.shape[1], dim, *strides,
            LISTED=LISTED, BLOCK=block, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return mean, other, sums, share, place


def pool_backward(grads: list[Tensor], share: Tensor, place: Tensor) -> list[Tensor]:
    """Return the gradients of one or two streams.

    Args:
        grads: Of their means, (batch, kept, dim), any strides.
        share: Of each token in its group, (batch, length), float32.
        place: Group of each token, (batch, length), int64.
    """
    (batch, length), dim = share.shape, grads[0].shape[2]
    out = [grad.new_empty(batch, length, dim) for grad in grads]
    block, warps = _channels(dim)
    second, second_out = (grads[1], out[1]) if len(grads) == 2 else (None, None)
    numbers = (batch * length, length, dim, *grads[0].stride(), *grads[-1].stride())
    with on_device(share):
        _pool_backward_kernel[(triton.cdiv(batch * length, ROWS), triton.cdiv(dim, block))](
            grads[0], second, out[0], second_out, share, place, *numbers,
            ROWS=ROWS, BLOCK=block, num_warps=ROWS * warps, **OPTIONS,
        )  # fmt: skip
    return out


def _channels(dim: int) -> tuple[int, int]:
    """Return the channels of a program, and the warps per row of them."""
    block = min(triton.next_power_of_2(dim), WIDEST)
    return block, max(1, block // 256)


def variants() -> Iterator[Variant]:
    """Yield the specializations for 192 and 384 channels, with and without a float32 residual."""
    for dim, (dtype, pointer), other in product((192, 384), POINTERS.items(), (None, "*fp32")):
        what = f"{str(dtype).removeprefix('torch.')} {dim}{' residual' if other else ''}"
        yield _variant(
            _pool_forward_kernel,
            f"pool_forward {what}",
            {"x": pointer, "x_mean": pointer, "residual": other, "residual_mean": other},
            dict.fromkeys(("weight", "size", "size_sum", "share"), "*fp32")
            | dict.fromkeys(("keep", "source", "target", "place"), "*i64"),
            dim,
            LISTED=LISTED,
        )
        yield _variant(
            _pool_backward_kernel,
            f"pool_backward {what}",
            {"first": pointer, "first_out": pointer, "second": other, "second_out": other},
            {"share": "*fp32", "place": "*i64"},
            dim,
            ROWS=ROWS,
        )


def _variant(
    kernel: Any,
    name: str,
    streams: dict[str, str | None],
    tables: dict[str, str],
    dim: int,
    **constants: int,
) -> Variant:
    """Describe a specialization by its streams, tables, constants and integers."""
    block, warps = _channels(dim)
    absent = [stream for stream, pointer in streams.items() if pointer is None]
    types = tables | {stream: pointer for stream, pointer in streams.items() if pointer}
    constants |= dict(BLOCK=block)
    known = {*types, *absent, *constants}
    numbers = [argument for argument in kernel.arg_names if argument not in known]
    strides = tuple(n for n in numbers if n == "dim" or n.endswith(("_batch", "_token")))
    return Variant(
        name=name,
        kernel=kernel,
        types=types | dict.fromkeys(numbers, "i32"),
        constants=constants | dict.fromkeys(absent),
        warps=warps * constants.get("ROWS", 1),
        aligned=(*types, *strides),
        ones=tuple(n for n in numbers if n.endswith("_channel")),
    )
