"""Gate of a Mamba block, as Triton kernels.

    out = scale * silu(z) * (sum over directions of y)

A program takes a tile of tokens x channels of one sample; every tensor is loaded and stored once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fambav.ops.triton.launch import OPTIONS, POINTERS, on_device
from fambav.ops.triton.variant import Variant

TOKENS = 16  # of a program
WARPS = 4


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)), without the checks of a division: the divisor is at least 1."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _tile(length, dim, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Sample, tokens, channels and their mask; channels vary fastest over programs."""
    blocks = tl.cdiv(dim, BLOCK)
    tiles = tl.cdiv(length, TOKENS)
    place = tl.program_id(0)
    row = place // blocks
    batch = (row // tiles).to(tl.int64)
    token = (row % tiles) * TOKENS + tl.arange(0, TOKENS)
    channel = (place % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < length)[:, None] & (channel < dim)[None, :]
    return batch, token.to(tl.int64)[:, None], channel.to(tl.int64)[None, :], inside


@triton.jit
def _put_score(
    score, y, gate, inside, token, place, GATED: tl.constexpr, CLIPPED: tl.constexpr
) -> None:
    """Store the sum over the channels of a tile; `place` is that of the first token."""
    terms = y * gate if GATED else y
    if CLIPPED:
        terms = tl.where(terms < 0.0, 0.0, terms)  # NaN stays
    total = tl.sum(terms, axis=1, keep_dims=True)
    tl.store(score + place + token, total, mask=tl.sum(inside.to(tl.int32), 1, keep_dims=True) > 0)


@triton.jit(do_not_specialize=["length", "images"])
def _gate_forward_kernel(
    y,
    z,
    out,
    total,
    score,
    length,
    images,
    dim,
    scale,
    y_direction,
    y_batch,
    y_token,
    y_channel,
    z_batch,
    z_token,
    z_channel,
    out_batch,
    out_token,
    out_channel,
    total_batch,
    total_token,
    total_channel,
    DIRECTIONS: tl.constexpr,
    GATED: tl.constexpr,
    CLIPPED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch, token, channel, inside = _tile(length, dim, TOKENS, BLOCK)
    y += batch * y_batch + token * y_token + channel * y_channel
    z += batch * z_batch + token * z_token + channel * z_channel
    gate = tl.load(z, mask=inside, other=0.0).to(tl.float32)
    both = tl.load(y, mask=inside, other=0.0).to(tl.float32)
    block = tl.program_id(0) % tl.cdiv(dim, BLOCK)
    if score is not None:
        place = (block * DIRECTIONS * images + batch) * length
        open_to = gate * sigmoid(gate)
        _put_score(score, both, open_to, inside, token, place, GATED, CLIPPED)
    if DIRECTIONS == 2:
        other = tl.load(y + y_direction, mask=inside, other=0.0).to(tl.float32)
        if score is not None:
            place += images.to(tl.int64) * length
            _put_score(score, other, open_to, inside, token, place, GATED, CLIPPED)
        both += other
    out += batch * out_batch + token * out_token + channel * out_channel
    tl.store(out, scale * both * gate * sigmoid(gate), mask=inside)
    if total is not None:
        total += batch * total_batch + token * total_token + channel * total_channel
        tl.store(total, both, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _gate_backward_kernel(
    grad,
    total,
    z,
    dy,
    dz,
    out,
    length,
    dim,
    scale,
    grad_batch,
    grad_token,
    grad_channel,
    total_batch,
    total_token,
    total_channel,
    z_batch,
    z_token,
    z_channel,
    dy_batch,
    dy_token,
    dy_channel,
    dz_batch,
    dz_token,
    dz_channel,
    out_batch,
    out_token,
    out_channel,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch, token, channel, inside = _tile(length, dim, TOKENS, BLOCK)
    grad += batch * grad_batch + token * grad_token + channel * grad_channel
    total += batch * total_batch + token * total_token + channel * total_channel
    z += batch * z_batch + token * z_token + channel * z_channel
    scaled = tl.load(grad, mask=inside, other=0.0).to(tl.float32) * scale
    both = tl.load(total, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z, mask=inside, other=0.0).to(tl.float32)
    gated = sigmoid(gate)
    dy += batch * dy_batch + token * dy_token + channel * dy_channel
    tl.store(dy, scaled * gate * gated, mask=inside)
    dz += batch * dz_batch + token * dz_token + channel * dz_channel
    tl.store(dz, scaled * both * gated * (1.0 + gate * (1.0 - gated)), mask=inside)
    if out is not None:
        out += batch * out_batch + token * out_token + channel * out_channel
        tl.store(out, scale * both * gate * gated, mask=inside)


def gate_forward(
    y: Tensor,
    z: Tensor,
    out: Tensor,
    total: Tensor | None,
    *,
    scale: float,
    score: Tensor | None = None,
    gated: bool = True,
    clipped: bool = True,
) -> None:
    """Sum the directions and gate the sum.

    Args:
        y: Results of the scans, (directions, batch, length, dim), any strides.
        z: Gate before silu, (batch, length, dim), any strides.
        out: Output for the result, like z.
        total: Output for the sum of y over directions, like z, or None.
        scale: Factor of the result.
        score: Output for the sum over the channels of each token in each direction, float32,
            (directions, batch, length), or None.
        gated: Whether the terms of that sum are y silu(z), or y.
        clipped: Whether negative terms are left out of it.
    """
    form = _form(z.shape[2])
    strides = (t.stride() for t in (y, z, out, out if total is None else total))
    batch, length, dim = z.shape
    parts = None
    if score is not None:  # (blocks of channels, directions, batch, length)
        parts = score.new_empty(triton.cdiv(dim, form["BLOCK"]), *score.shape)
    with on_device(z):
        _gate_forward_kernel[_grid(z, form)](
            y, z, out, total, parts, length, batch, dim, scale, *chain.from_iterable(strides),
            DIRECTIONS=y.shape[0], GATED=gated, CLIPPED=clipped, **form,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    if score is not None and parts is not None:
        torch.sum(parts, dim=0, out=score)


def gate_backward(
    grad: Tensor,
    total: Tensor,
    z: Tensor,
    dy: Tensor,
    dz: Tensor,
    out: Tensor | None = None,
    *,
    scale: float,
) -> None:
    """Write the gradients of y, equal for every direction, and of z.

    Args:
        grad: Gradient of the result, (batch, length, dim), any strides.
        total: Sum of y over directions, like grad.
        z: Gate before silu, like grad.
        dy: Output for the gradient of y, like grad.
        dz: Output for the gradient of z, like grad.
        out: Output for the recomputed result, like grad; None for none.
        scale: Factor of the result.
    """
    form = _form(z.shape[2])
    tensors = (grad, total, z, dy, dz, out)
    strides = (dy.stride() if t is None else t.stride() for t in tensors)
    with on_device(z):
        _gate_backward_kernel[_grid(z, form)](
            *tensors, *z.shape[1:], scale, *chain.from_iterable(strides),
            **form, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip


def _form(dim: int) -> dict[str, Any]:
    """Return the constants of a specialization."""
    return dict(TOKENS=TOKENS, BLOCK=64 if dim % 128 else 128)


def _grid(z: Tensor, form: dict[str, Any]) -> tuple[int]:
    batch, length, dim = z.shape
    return (batch * triton.cdiv(length, form["TOKENS"]) * triton.cdiv(dim, form["BLOCK"]),)


def variants() -> Iterator[Variant]:
    """Yield the usual specializations: dim a multiple of 64, channels contiguous."""
    for dtype in POINTERS:
        for dim in (64, 128):
            for directions in (1, 2):
                form = dict(DIRECTIONS=directions, GATED=True, CLIPPED=True, **_form(dim))
                yield _variant(_gate_forward_kernel, dtype, form | dict(score=None))
                yield _variant(_gate_forward_kernel, dtype, form | dict(score=None, total=None))
            yield _variant(_gate_backward_kernel, dtype, _form(dim))
            yield _variant(_gate_backward_kernel, dtype, _form(dim) | dict(out=None))
        yield _variant(_gate_forward_kernel, dtype, form)


def _variant(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> Variant:
    arguments = [name for name in kernel.arg_names if name not in constants]
    tensors = ("y", "z", "out", "total", "grad", "dy", "dz")
    types = {name: "fp32" if name == "scale" else "i32" for name in arguments}
    types |= {name: "*fp32" for name in arguments if name == "score"}
    types |= {name: POINTERS[dtype] for name in arguments if name in tensors}
    what = f"K{constants['DIRECTIONS']} " if "DIRECTIONS" in constants else ""
    what += "".join(f"no {name} " for name in ("total", "out") if name in constants)
    what += "score " if "score" in types else ""
    return Variant(
        name=f"{kernel.__name__.strip('_')} {what}{POINTERS[dtype][1:]} BD{constants['BLOCK']}",
        kernel=kernel,
        types=types,
        constants=constants,
        warps=WARPS,
        aligned=tuple(n for n in arguments if n not in ("length", "images", "scale")),
        ones=tuple(n for n in arguments if n.endswith("_channel")),
    )
