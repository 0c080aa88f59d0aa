"""Exponentials and what is made of them, on vectors.

Relative errors are below 1e-6; where a result is too small for that in float32, it may be 0.  NaN
gives NaN.  Coefficients are minimax fits of ours whose constant is held at 1, so that a state which
hardly decays is multiplied by a number with hardly an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fambav.ops.numba.compilation import inlined
from fambav.ops.numba.lanes import exponent, largest, smallest, where_less

ZERO, ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
LOG2_E, LN_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)

# ln 2 in two parts; a whole number below 2**9 times the first is exact.
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.121944400546906e-4)

# Rounds what it is added to, and leaves in the lowest bits that whole number as an exponent.
_ROUND = np.float32(1.5 * 2**23 + 127)

# Where the exponent becomes 0 and infinite, and the first of them for e in place of 2.
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
