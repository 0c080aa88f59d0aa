"""Addition and RMS normalisation in one pass over the rows, by Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fambav.ops.dispatch import Backend
from fambav.ops.kernels import TRITON, on_gpu

MAX_DIM = 16384  # a row is held in registers


def refuses(hidden: Tensor, residual: Tensor | None, weight: Tensor) -> str | None:
    """Say why these tensors cannot run here, or None."""
    if not hidden.numel():
        return "there are no tokens"
    if hidden.shape[-1] > MAX_DIM:
        return f"dim is {hidden.shape[-1]}, expected at most {MAX_DIM}"
    given = (hidden, weight) if residual is None else (hidden, weight, residual)
    return next(filter(None, map(TRITON.refuses, given)), None)


def add_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return normed and the new residual, as `add_rms_norm` says."""
    normed, total, _ = _forward(hidden, residual, weight, eps=eps, dtype=dtype)
    return normed, total


TRITON_NORM = Backend(
    "triton",
    add_norm,
    refuses,
    TRITON.missing,
    default=lambda hidden, residual, weight: on_gpu(hidden, weight),
)


def _rows(x: Tensor) -> Tensor:
    """View as (rows, dim), or copy where the numbers of a row are not next to each other."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@custom_op(
    "fambav::add_rms_norm",
    mutates_args=(),
    schema="(Tensor hidden, Tensor? residual, Tensor weight, *, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed, the sum, and the scale of each row."""
    normed, total = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape, dtype=dtype)
    given = _rows(hidden), None if residual is None else _rows(residual), weight
    places = _rows(normed), _rows(total)
    scale: Tensor = TRITON.load().add_rms_norm_forward(*given, *places, eps=eps)
    return normed, total, scale


@_forward.register_fake
def _forward_shapes(hidden: Tensor, *_: Any, eps: float, dtype: torch.dtype) -> Any:
    del eps
    normed, total = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape, dtype=dtype)
    return normed, total, hidden.new_empty(math.prod(hidden.shape[:-1]), dtype=torch.float32)


@custom_op(
    "fambav::add_rms_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_total, Tensor total, Tensor weight, Tensor scale,"
    " *, ScalarType? dtype) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Return the gradients of weight, of hidden, and of a residual of `dtype` if there is one."""
    found = [grad.new_empty(grad.shape)]
    if dtype is not None:
        found.append(grad.new_empty(grad.shape, dtype=dtype))
    given = _rows(grad), None if grad_total is None else _rows(grad_total), _rows(total)
    places = [_rows(x) for x in found]
    run = TRITON.load().add_rms_norm_backward
    dweight = run(*given, weight, scale, places[0], places[1] if dtype is not None else None)
    return [torch.empty_like(weight).copy_(dweight), *found]


@_backward.register_fake
def _backward_shapes(
    grad: Tensor, grad_total: Any, total: Any, weight: Tensor, scale: Any, *, dtype: Any
) -> list[Tensor]:
    del grad_total, total, scale
    found = [torch.empty_like(weight), grad.new_empty(grad.shape)]
    return found if dtype is None else [*found, grad.new_empty(grad.shape, dtype=dtype)]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    hidden, residual, weight = inputs
    normed, total, scale = output
    del hidden, normed, keyword_only_inputs
    ctx.save_for_backward(total, weight, scale)
    ctx.dtype = None if residual is None else residual.dtype


def _gradient(ctx: Any, grad: Tensor, grad_total: Tensor, _: Any) -> Any:
    dweight, dhidden, *rest = _backward(grad, grad_total, *ctx.saved_tensors, dtype=ctx.dtype)
    return dhidden, rest[0] if rest else None, dweight


_forward.register_autograd(_gradient, setup_context=_setup)
