"""Addition to the residual stream and RMS normalisation, as Triton kernels.

    total = residual + factor of the sample * hidden
    normed = total / sqrt(mean(total^2) + eps) * weight

A program holds a few whole rows in registers, so that each is loaded once.  In the backward pass it
loops over more rows, accumulating its part of the gradient of the weight in registers.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fambav.ops.triton.launch import OPTIONS, POINTERS, on_device
from fambav.ops.triton.variant import Variant

NUMBERS = 256  # elements of its rows that a warp holds; with twice as many, registers spill
MOST_PROGRAMS = 2048  # of the backward pass, each with a row of partial sums


@triton.jit
def _rows(tensor, row, stride, column):
    return tensor + row[:, None] * stride + column[None, :]


@triton.jit
def _of_sample(factor, row, rows, length) -> tl.tensor:
    """Load the factor of each row's sample, a column."""
    return tl.load(factor + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["rows", "length"])
def _norm_forward_kernel(
    hidden,
    residual,
    weight,
    factor,
    normed,
    total,
    scale,
    rows,
    length,
    dim,
    eps,
    hidden_row,
    residual_row,
    normed_row,
    total_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    value = tl.load(_rows(hidden, row, hidden_row, column), mask=inside, other=0.0).to(tl.float32)
    if factor is not None:
        value *= _of_sample(factor, row, rows, length)
    if residual is not None:
        before = tl.load(_rows(residual, row, residual_row, column), mask=inside, other=0.0)
        value += before.to(tl.float32)
    stored = value.to(total.dtype.element_ty)
    tl.store(_rows(total, row, total_row, column), stored, mask=inside)
    value = stored.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / dim + eps)
    tl.store(scale + row, inverse, mask=row < rows)
    gain = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    value *= inverse[:, None] * gain[None, :]
    tl.store(_rows(normed, row, normed_row, column), value, mask=inside)


@triton.jit(do_not_specialize=["rows", "length", "stretch"])
def _norm_backward_kernel(
    grad_normed,
    grad_total,
    total,
    weight,
    scale,
    factor,
    dhidden,
    dresidual,
    partial,
    rows,
    length,
    dim,
    stretch,
    grad_normed_row,
    grad_total_row,
    total_row,
    dhidden_row,
    dresidual_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    exists = column < dim
    gain = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    grown = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * stretch
    for start in range(0, stretch, ROWS):
        row = first + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & exists[None, :]
        inverse = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        pull = tl.load(_rows(grad_normed, row, grad_normed_row, column), mask=inside, other=0.0)
        value = tl.load(_rows(total, row, total_row, column), mask=inside, other=0.0)
        value = value.to(tl.float32) * inverse
        pull = pull.to(tl.float32)
        grown += pull * value
        pull *= gain
        along = tl.sum(pull * value, axis=1) / dim
        pull = (pull - value * along[:, None]) * inverse
        if grad_total is not None:
            more = tl.load(_rows(grad_total, row, grad_total_row, column), mask=inside, other=0.0)
            pull += more.to(tl.float32)
        if dresidual is not None:
            tl.store(_rows(dresidual, row, dresidual_row, column), pull, mask=inside)
        if factor is not None:
            pull *= _of_sample(factor, row, rows, length)
        tl.store(_rows(dhidden, row, dhidden_row, column), pull, mask=inside)
    place = partial + tl.program_id(0).to(tl.int64) * dim + column
    tl.store(place, tl.sum(grown, axis=0), mask=exists)


def add_rms_norm_forward(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    normed: Tensor,
    total: Tensor,
    *,
    eps: float,
    factor: Tensor | None = None,
) -> Tensor:
    """Add to the residual stream and normalise the sum.

    Args:
        hidden: (rows, dim), rows contiguous, with any stride between them, as below.
        residual: (rows, dim), or None for zeros.
        weight: (dim,).
        normed: Output for the result, (rows, dim).
        total: Output for the sum, (rows, dim), which is rounded to its dtype before the norm.
        eps: Added to the mean square.
        factor: Of hidden, (samples,), each of which has the same number of rows; None for 1.

    Returns:
        The scale of each row, (rows,), float32.
    """
    rows, dim = hidden.shape
    form, warps = _form(dim)
    scale = hidden.new_empty(rows, dtype=torch.float32)
    tensors = (hidden, residual, normed, total)
    strides = [0 if t is None else t.stride(0) for t in tensors]
    with on_device(hidden):
        _norm_forward_kernel[(triton.cdiv(rows, form["ROWS"]),)](
            hidden, residual, weight.contiguous(), factor, normed, total, scale,
            rows, _length(rows, factor), dim, eps, *strides,
            **form, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return scale


def add_rms_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    dhidden: Tensor,
    dresidual: Tensor | None,
    *,
    factor: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the weight; write that of the sum to both of its terms.

    Args:
        grad_normed: Gradient of the result, (rows, dim), rows contiguous, with any stride between
            them, as below.
        grad_total: Gradient of the sum, (rows, dim), or None for zeros.
        total: The sum, (rows, dim).
        weight: (dim,).
        scale: As the forward pass returned it.
        dhidden: Output for the gradient of hidden, (rows, dim).
        dresidual: Output for that of the residual, (rows, dim), or None.
        factor: As in the forward pass.

    Returns:
        dweight, (dim,), float32; the order of its sum depends on shapes alone.
    """
    rows, dim = total.shape
    form, warps = _form(dim)
    stretch = triton.cdiv(triton.cdiv(rows, MOST_PROGRAMS), form["ROWS"]) * form["ROWS"]
    programs = triton.cdiv(rows, stretch)
    partial = total.new_empty(programs, dim, dtype=torch.float32)
    tensors = (grad_normed, grad_total, total, dhidden, dresidual)
    strides = [0 if t is None else t.stride(0) for t in tensors]
    with on_device(total):
        _norm_backward_kernel[(programs,)](
            grad_normed, grad_total, total, weight.contiguous(), scale, factor, dhidden, dresidual,
            partial, rows, _length(rows, factor), dim, stretch, *strides,
            **form, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return partial.sum(dim=0)


def _length(rows: int, factor: Tensor | None) -> int:
    """Return the rows of a sample."""
    return rows if factor is None else rows // len(factor)


def _form(dim: int) -> tuple[dict[str, Any], int]:
    """Return the constants of a specialization, and its warps."""
    block = triton.next_power_of_2(dim)
    return dict(ROWS=max(1, NUMBERS // block), BLOCK=block), min(16, max(1, block // NUMBERS))


def variants() -> Iterator[Variant]:
    """Yield the usual specializations: the models' widths and float32 totals."""
    for dtype in POINTERS:
        for dim in (64, 192, 384, 768):
            for left_out in (("factor",), ("residual", "factor")):
                yield _variant(_norm_forward_kernel, dtype, dim, left_out)
            for left_out in (("factor",), ("grad_total", "factor"), ("dresidual", "factor")):
                yield _variant(_norm_backward_kernel, dtype, dim, left_out)
            if dtype != torch.float16:
                for kernel in (_norm_forward_kernel, _norm_backward_kernel):
                    yield _variant(kernel, dtype, dim, ())


def _variant(kernel: Any, dtype: torch.dtype, dim: int, left_out: tuple[str, ...]) -> Variant:
    form, warps = _form(dim)
    constants = form | dict.fromkeys(left_out)
    arguments = [name for name in kernel.arg_names if name not in constants]
    types = {name: "fp32" if name == "eps" else "i32" for name in arguments}
    narrow = ("hidden", "normed", "grad_normed", "dhidden")
    upcast: tuple[str, ...] = (
        "residual",
        "weight",
        "total",
        "scale",
        "factor",
        "grad_total",
        "dresidual",
    )
    upcast += ("partial",)
    types |= {name: POINTERS[dtype] for name in arguments if name in narrow}
    types |= {name: "*fp32" for name in arguments if name in upcast}
    what = "".join(f"no {name} " for name in left_out if name != "factor")
    what += "" if "factor" in left_out else "factor "
    return Variant(
        name=f"{kernel.__name__.strip('_')} {what}{POINTERS[dtype][1:]} BD{form['BLOCK']}",
        kernel=kernel,
        types=types,
        constants=constants,
        warps=warps,
        aligned=tuple(n for n in arguments if n not in ("rows", "length", "stretch", "eps")),
        loop_work=(form["ROWS"] * form["BLOCK"],) if "stretch" in arguments else (),
    )
