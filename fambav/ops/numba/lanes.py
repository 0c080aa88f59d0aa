"""SIMD vectors for numba: one float32 of each of 16 neighbouring channels.

numba leaves vectorization to LLVM, which must first prove that no two arrays alias.  Here vectors
are a type, so that a kernel for vectors reads like one for scalars.  Where registers are narrower,
LLVM splits a vector over several of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import lower_builtin, models, register_model

from fambav.ops.numba.compilation import emitted

WIDTH = 16  # lanes of a vector

_INT = ir.IntType(32)
_INTS = ir.VectorType(_INT, WIDTH)
VECTOR = ir.VectorType(ir.FloatType(), WIDTH)


class LanesType(types.Type):
    """The type of a vector of float32."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes{WIDTH}")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, of: LanesType) -> None:
        super().__init__(manager, of, VECTOR)


LANES = LanesType()


def _broadcast(builder: Any, x: Any) -> Any:
    """Broadcast a scalar to all lanes; return a vector unchanged."""
    if x.type == VECTOR:
        return x
    first = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), x, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * WIDTH))


def _let_operator_take_vectors(function: Callable[..., Any], instruction: str) -> None:
    """Define an operator for two vectors, and for a vector and a scalar.

    Contraction to FMA is allowed, but no other fast-math flag: no reassociation, and NaN counts.
    """
    pairs = [(LANES, LANES), (LANES, types.float32), (types.float32, LANES)]
    cases = [LANES(*pair) for pair in pairs]
    infer_global(function)(type("_Cases", (ConcreteTemplate,), dict(key=function, cases=cases)))

    def emit(context: Any, builder: Any, taken: Any, args: Any) -> Any:
        del context, taken
        operands = [_broadcast(builder, x) for x in args]
        return getattr(builder, instruction)(*operands, flags=("contract",))

    for pair in pairs:
        lower_builtin(function, *pair)(emit)


_let_operator_take_vectors(operator.add, "fadd")
_let_operator_take_vectors(operator.sub, "fsub")
_let_operator_take_vectors(operator.mul, "fmul")
_let_operator_take_vectors(operator.truediv, "fdiv")


@emitted
def rounded_product(typing: Any, x: Any, factor: Any) -> Any:
    """Return a product that is rounded even where it is a term of a sum."""
    del typing

    def emit(context: Any, builder: Any, taken: Any, args: Any) -> Any:
        del context, taken
        return builder.fmul(*(_broadcast(builder, x) for x in args))

    return LANES(x, factor), emit


@emitted
def broadcast(typing: Any, x: Any) -> Any:
    """Broadcast a scalar to all lanes."""
    del typing, x
    return LANES(types.float32), lambda context, builder, taken, args: _broadcast(builder, args[0])


def _choice(comparison: str, then: int, otherwise: int) -> Callable[..., Any]:
    """Select between two arguments, given by index, by an ordered comparison of the first two.

    NaN compares false, so that the second is selected.
    """

    def emit(context: Any, builder: Any, taken: Any, args: Any) -> Any:
        del context, taken
        values = [_broadcast(builder, x) for x in args]
        holds = builder.fcmp_ordered(comparison, values[0], values[1])
        return builder.select(holds, values[then], values[otherwise])

    return emit


@emitted
def largest(typing: Any, x: Any, limit: Any) -> Any:
    """Return the larger of two; x where x is NaN."""
    del typing
    return LANES(x, limit), _choice("<", 1, 0)


@emitted
def smallest(typing: Any, x: Any, limit: Any) -> Any:
    """Return the smaller of two; x where x is NaN."""
    del typing
    return LANES(x, limit), _choice(">", 1, 0)


@emitted
def where_less(typing: Any, x: Any, limit: Any, then: Any, otherwise: Any) -> Any:
    """Return `then` where x is less than the limit, elsewhere `otherwise`."""
    del typing
    return LANES(x, limit, then, otherwise), _choice("<", 2, 3)


@emitted
def exponent(typing: Any, x: Any) -> Any:
    """Return the float32 whose bits are the lowest nine of x followed by zeros."""
    del typing

    def emit(context: Any, builder: Any, taken: Any, args: Any) -> Any:
        del context, taken
        bits = builder.bitcast(args[0], _INTS)
        return builder.bitcast(builder.shl(bits, ir.Constant(_INTS, [23] * WIDTH)), VECTOR)

    return LANES(x), emit


@emitted
def total(typing: Any, x: Any) -> Any:
    """Sum the lanes pairwise, the upper half onto the lower half."""
    del typing

    def emit(context: Any, builder: Any, taken: Any, args: Any) -> Any:
        del context, taken
        x, width = args[0], WIDTH
        while width > 1:
            half = width // 2
            order = ir.VectorType(_INT, half)
            low = builder.shuffle_vector(x, x, ir.Constant(order, list(range(half))))
            high = builder.shuffle_vector(x, x, ir.Constant(order, list(range(half, width))))
            x, width = builder.fadd(low, high), half
        return builder.extract_element(x, ir.Constant(_INT, 0))

    return types.float32(x), emit


@emitted
def lane(typing: Any, x: Any, index: Any) -> Any:
    """Return one lane of a vector."""
    del typing, index

    def emit(context: Any, builder: Any, taken: Any, args: Any) -> Any:
        del context, taken
        return builder.extract_element(*args)

    return types.float32(x, types.int64), emit


@emitted
def with_lane(typing: Any, x: Any, index: Any, value: Any) -> Any:
    """Return a vector with one lane replaced."""
    del typing, index, value

    def emit(context: Any, builder: Any, taken: Any, args: Any) -> Any:
        del context, taken
        x, index, value = args
        return builder.insert_element(x, value, index)

    return LANES(x, types.int64, types.float32), emit
