"""Vectorized exp2, sigmoid, silu and softplus.

Relative errors are below 1e-6; results below the normal float32 range may be flushed to 0.  NaN
propagates.  Coefficients are minimax fits of ours with the constant term fixed at 1, so that the
decay of a state is exact as the step size goes to 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fambav.ops.numba.compilation import inlined
from fambav.ops.numba.lanes import exponent, largest, smallest, where_less

ZERO, ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
LOG2_E, LN_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)

# ln 2 in two parts; the product of the first and an integer below 2**9 is exact.
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.121944400546906e-4)

# Adding it rounds to an integer, whose biased exponent is left in the lowest bits.
_ROUND = np.float32(1.5 * 2**23 + 127)

# Range of the exponent for base 2, and its lower limit for base e.
_LEAST, _MOST, _LEAST_OF_E = np.float32(-127), np.float32(128), np.float32(-88)

# 2**f for |f| <= 1/2, to 2.6e-9.
_P1, _P2, _P3 = np.float32(0.6931472421), np.float32(0.2402265221), np.float32(0.0555031039)
_P4, _P5, _P6 = np.float32(0.0096176928), np.float32(0.0013406643), np.float32(0.0001559468)

# artanh(s) / s in powers of s**2 for s <= 1/3, to 4.5e-9.
_R1, _R2 = np.float32(0.3333320916), np.float32(0.2001076341)
_R3, _R4 = np.float32(0.1400090307), np.float32(0.1400599331)


@inlined
def _power(f: Any, rounded: Any) -> Any:
    """Return 2**(f + n), where n was rounded by `_ROUND`."""
    p = ((((_P6 * f + _P5) * f + _P4) * f + _P3) * f + _P2) * f + _P1
    return (p * f + ONE) * exponent(rounded)


@inlined
def exp2(x: Any) -> Any:
    """Return 2**x: 0 below -126.5, infinite above 127.5."""
    x = smallest(largest(x, _LEAST), _MOST)
    rounded = x + _ROUND
    return _power(x - (rounded - _ROUND), rounded)


@inlined
def exp2_of_four(x0: Any, x1: Any, x2: Any, x3: Any) -> Any:
    """Return 2**x of each, to the bit as `exp2` does, but with their steps interleaved."""
    x0, x1 = smallest(largest(x0, _LEAST), _MOST), smallest(largest(x1, _LEAST), _MOST)
    x2, x3 = smallest(largest(x2, _LEAST), _MOST), smallest(largest(x3, _LEAST), _MOST)
    r0, r1, r2, r3 = x0 + _ROUND, x1 + _ROUND, x2 + _ROUND, x3 + _ROUND
    x0, x1, x2, x3 = x0 - (r0 - _ROUND), x1 - (r1 - _ROUND), x2 - (r2 - _ROUND), x3 - (r3 - _ROUND)
    p0, p1, p2, p3 = _P6 * x0 + _P5, _P6 * x1 + _P5, _P6 * x2 + _P5, _P6 * x3 + _P5
    p0, p1, p2, p3 = p0 * x0 + _P4, p1 * x1 + _P4, p2 * x2 + _P4, p3 * x3 + _P4
    p0, p1, p2, p3 = p0 * x0 + _P3, p1 * x1 + _P3, p2 * x2 + _P3, p3 * x3 + _P3
    p0, p1, p2, p3 = p0 * x0 + _P2, p1 * x1 + _P2, p2 * x2 + _P2, p3 * x3 + _P2
    p0, p1, p2, p3 = p0 * x0 + _P1, p1 * x1 + _P1, p2 * x2 + _P1, p3 * x3 + _P1
    p0, p1, p2, p3 = p0 * x0 + ONE, p1 * x1 + ONE, p2 * x2 + ONE, p3 * x3 + ONE
    return p0 * exponent(r0), p1 * exponent(r1), p2 * exponent(r2), p3 * exponent(r3)


@inlined
def _exp_of_minus_size(x: Any) -> Any:
    """Return exp(-|x|): 0 above 87.7."""
    x = largest(smallest(x, ZERO - x), _LEAST_OF_E)
    rounded = x * LOG2_E + _ROUND
    whole = rounded - _ROUND
    return _power(((x - whole * _LN_2_HIGH) - whole * _LN_2_LOW) * LOG2_E, rounded)


@inlined
def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + exp(-x))."""
    e = _exp_of_minus_size(x)
    return where_less(x, ZERO, e, ONE) / (e + ONE)


@inlined
def silu_slope(x: Any, s: Any) -> Any:
    """Return the derivative of x sigmoid(x), given s = sigmoid(x)."""
    return s * (ONE + x * (ONE - s))


@inlined
def softplus(x: Any) -> Any:
    """Return log(1 + exp(x)) and its derivative, sigmoid(x)."""
    e = _exp_of_minus_size(x)
    s = e / (e + _TWO)  # log(1 + e) = 2 artanh(s), which loses no digits of a small e
    w = s * s
    p = (((_R4 * w + _R3) * w + _R2) * w + _R1) * w + ONE
    return largest(x, ZERO) + _TWO * s * p, where_less(x, ZERO, e, ONE) / (e + ONE)
