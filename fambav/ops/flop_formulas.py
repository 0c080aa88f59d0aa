"""How many floating-point operations our operators do, for `torch.utils.flop_counter`.

Importing this module registers them, and `fambav.models` does so where Triton is installed: the
counter warns without it, so that nothing else here should import the counter.

A multiplication and an addition are two operations, an exponential is one.  What a backward pass
recomputes counts again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import fambav.ops.bimamba
import fambav.ops.pool  # noqa: F401  registers its operators, as the one above does
from fambav.ops.match import halves

SCAN, SCAN_BACKWARD = 7, 20  # for each number of state and token
_OPS = torch.ops.fambav


def _product(sizes: Iterable[int]) -> int:
    return int(math.prod(sizes))


@register_flop_formula([_OPS.fused_scan, _OPS.chunked_scan])
def _scan(*tensors: Any, **options: Any) -> int:
    del options
    return SCAN * _states(*tensors)


def _states(u: Any, delta: Any, A: Any, *rest: Any) -> int:
    """Count the numbers of state and token, by an order those of its steps."""
    del delta
    order = rest[7] if len(rest) > 7 else None
    return _product((u[0], u[2] if order is None else order[-2], *A))


@register_flop_formula([_OPS.fused_scan_backward])
def _scan_backward(
    grad: Any, grad_state: Any, kept: Any, y: Any, *rest: Any, **options: Any
) -> int:
    del grad, grad_state, kept, y, options
    return SCAN_BACKWARD * _states(*rest)


@register_flop_formula([_OPS.chunked_scan_backward])
def _chunked_backward(grad: Any, grad_state: Any, kept: Any, *rest: Any, **options: Any) -> int:
    return _scan_backward(grad, grad_state, kept, None, *rest, **options)


@register_flop_formula(_OPS.fused_conv)
def _conv(x: Any, weight: Any, *_: Any, **options: Any) -> int:
    del options
    return 2 * _product((*x, weight[1]))


@register_flop_formula(_OPS.fused_conv_backward)
def _conv_backward(grad: Any, x: Any, weight: Any, *_: Any, **options: Any) -> int:
    """Count the gradients of x and of weight, and what precedes the activation."""
    del grad, options
    return 6 * _product((*x, weight[1]))


def _bimamba_parts(xz: Any, parameters: tuple[Any, ...]) -> tuple[int, int, int, int]:
    """Count for both directions.

    Returns:
        Operations of x_proj and dt_proj, of out_proj, of the convolutions; steps of the state.
    """
    conv, _, x_proj, dt_proj, _, A, _ = parameters[:7]
    out_proj, tokens = parameters[14], xz[0] * xz[1]
    out = 2 * tokens * _product(out_proj) if out_proj else 0
    inner = 4 * tokens * (_product(x_proj) + _product(dt_proj))
    return inner, out, 4 * tokens * _product(conv), 2 * tokens * _product(A)


@register_flop_formula(_OPS.bimamba_scan)
def _bimamba(xz: Any, *rest: Any, **options: Any) -> int:
    del options
    inner, out, conv, steps = _bimamba_parts(xz, rest)
    return inner + out + conv + SCAN * steps


@register_flop_formula(_OPS.bimamba_scan_backward)
def _bimamba_backward(
    grad: Any, projected: Any, total: Any, kept: Any, xz: Any, *rest: Any, **options: Any
) -> int:
    """Count two products for each one of the forward pass; the convolutions and dt_proj again."""
    del grad, projected, total, kept, options
    inner, out, conv, steps = _bimamba_parts(xz, rest)
    dt_proj = 4 * _product((*xz[:2], *rest[3]))
    return 2 * (inner + out) + dt_proj + 3 * conv + SCAN_BACKWARD * steps


def _linear(x: Any, weight: Any, *_: Any, **options: Any) -> int:
    del options
    return 2 * _product((*x, weight[0]))


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # see `products`
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_linear)


@register_flop_formula(_OPS.add_rms_norm)
def _norm(hidden: Any, *_: Any, **options: Any) -> int:
    """Count the sum, the square and its sum, and both factors."""
    del options
    return 5 * _product(hidden)


@register_flop_formula(_OPS.add_rms_norm_backward)
def _norm_backward(grad: Any, *_: Any, **options: Any) -> int:
    """Count the gradients of the product, of the mean and of weight, and the sum."""
    del options
    return 9 * _product(grad)


@register_flop_formula(_OPS.match)
def _match(x: Any, cls_index: Any, *_: Any, in_order: bool, **options: Any) -> int:
    """Count the scores."""
    del options
    batch, length, dim = x
    evens, odds = halves(length, cls_index[1], in_order=in_order)
    return 2 * _product((batch, evens, odds, dim))


@register_flop_formula(_OPS.pool)
def _pool(x: Any, residual: Any, *_: Any, **options: Any) -> int:
    """Count a share and a sum for each number of each stream."""
    del options
    return 2 * _product(x) * (1 if residual is None else 2)


@register_flop_formula(_OPS.pool_backward)
def _pool_backward(grads: Any, share: Any, *_: Any, **options: Any) -> int:
    """Count a share for each number of each stream."""
    del options
    return sum(_product((*share, grad[2])) for grad in grads)
