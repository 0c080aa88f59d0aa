"""Loads and stores of vectors: from tensors with any strides, and from buffers of a thread.

Indices are neither checked nor wrapped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from fambav.ops.numba.compilation import called, emitted, inlined
from fambav.ops.numba.lanes import LANES, VECTOR, WIDTH, broadcast, lane, with_lane

_BYTES = 4  # of a float32


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, indices: Any) -> Any:
    """Return the address of an element of an array."""
    view = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, view, indices)


def _emit_number(context: Any, builder: Any, taken: Any, args: Any) -> Any:
    return builder.load(_pointer(context, builder, taken.args[0], args[0], args[1:]))


@emitted
def number(typing: Any, buffer: Any, index: Any) -> Any:
    """Load one element of a buffer."""
    del typing, index
    return types.float32(buffer, types.int64), _emit_number


@emitted
def number_at(typing: Any, x: Any, k: Any, b: Any, t: Any, group: Any, n: Any) -> Any:
    """Load one element of a tensor of five axes."""
    del typing, k, b, t, group, n
    return types.float32(x, *[types.int64] * 5), _emit_number


def _emit_read(context: Any, builder: Any, taken: Any, args: Any) -> Any:
    pointer = _pointer(context, builder, taken.args[0], args[0], args[1:])
    return builder.load(builder.bitcast(pointer, VECTOR.as_pointer()), align=_BYTES)


def _emit_write(context: Any, builder: Any, taken: Any, args: Any) -> Any:
    pointer = _pointer(context, builder, taken.args[0], args[0], args[1:-1])
    builder.store(args[-1], builder.bitcast(pointer, VECTOR.as_pointer()), align=_BYTES)
    return context.get_dummy_value()


@emitted
def _read_buffer(typing: Any, buffer: Any, start: Any) -> Any:
    del typing, start
    return LANES(buffer, types.int64), _emit_read


@emitted
def _write_buffer(typing: Any, buffer: Any, start: Any, x: Any) -> Any:
    del typing, start
    return types.void(buffer, types.int64, x), _emit_write


@emitted
def _read_row(typing: Any, x: Any, i: Any, j: Any, k: Any, channel: Any) -> Any:
    del typing, i, j, k, channel
    return LANES(x, *[types.int64] * 4), _emit_read


@emitted
def _write_row(typing: Any, x: Any, i: Any, j: Any, k: Any, channel: Any, value: Any) -> Any:
    del typing, i, j, k, channel
    return types.void(x, *[types.int64] * 4, value), _emit_write


_LANES = ir.VectorType(ir.IntType(32), WIDTH)
_MASK = ir.VectorType(ir.IntType(1), WIDTH)


def _emit_mask(builder: Any, count: Any) -> Any:
    """Return the mask of the lanes below `count`, an int64."""
    number = builder.trunc(count, ir.IntType(32))
    first = builder.insert_element(
        ir.Constant(_LANES, ir.Undefined), number, ir.Constant(ir.IntType(32), 0)
    )
    limit = builder.shuffle_vector(first, first, ir.Constant(_LANES, [0] * WIDTH))
    return builder.icmp_signed("<", ir.Constant(_LANES, list(range(WIDTH))), limit)


def _intrinsic(builder: Any, name: str, signature: Any) -> Any:
    """Return LLVM's masked load or store; LLVM completes the name by its types."""
    return cgutils.get_or_insert_function(
        builder.module, signature, f"llvm.masked.{name}.v{WIDTH}f32.p0"
    )


def _emit_read_part(context: Any, builder: Any, taken: Any, args: Any) -> Any:
    pointer = _pointer(context, builder, taken.args[0], args[0], args[1:-1])
    row, align = VECTOR.as_pointer(), ir.IntType(32)
    load = _intrinsic(builder, "load", ir.FunctionType(VECTOR, [row, align, _MASK, VECTOR]))
    zero = ir.Constant(VECTOR, [0.0] * WIDTH)
    mask = _emit_mask(builder, args[-1])
    return builder.call(load, [builder.bitcast(pointer, row), align(_BYTES), mask, zero])


def _emit_write_part(context: Any, builder: Any, taken: Any, args: Any) -> Any:
    pointer = _pointer(context, builder, taken.args[0], args[0], args[1:-2])
    row, align, nothing = VECTOR.as_pointer(), ir.IntType(32), ir.VoidType()
    store = _intrinsic(builder, "store", ir.FunctionType(nothing, [VECTOR, row, align, _MASK]))
    mask = _emit_mask(builder, args[-2])
    builder.call(store, [args[-1], builder.bitcast(pointer, row), align(_BYTES), mask])
    return context.get_dummy_value()


@emitted
def _read_part(typing: Any, x: Any, i: Any, j: Any, k: Any, channel: Any, count: Any) -> Any:
    del typing, i, j, k, channel, count
    return LANES(x, *[types.int64] * 5), _emit_read_part


@emitted
def _write_part(
    typing: Any, x: Any, i: Any, j: Any, k: Any, channel: Any, count: Any, value: Any
) -> Any:
    del typing, i, j, k, channel, count
    return types.void(x, *[types.int64] * 5, value), _emit_write_part


def _emit_fetch(context: Any, builder: Any, taken: Any, args: Any) -> Any:
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    start = builder.bitcast(_pointer(context, builder, taken.args[0], args[0], args[1:]), byte)
    signature = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    run = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    for offset in (0, _BYTES * WIDTH - 1):  # a vector may lie on two cache lines
        at = builder.gep(start, [ir.Constant(ir.IntType(64), offset)], source_etype=ir.IntType(8))
        builder.call(run, [at, number(0), number(3), number(1)])
    return context.get_dummy_value()


@emitted
def fetch(typing: Any, x: Any, i: Any, j: Any, k: Any, channel: Any) -> Any:
    """Let the cache fetch neighbouring channels of a tensor of four axes, wherever that is."""
    del typing, i, j, k, channel
    return types.void(x, *[types.int64] * 4), _emit_fetch


@inlined
def get(buffer: Any, index: int) -> Any:
    """Load a vector of a buffer; the index counts vectors."""
    return _read_buffer(buffer, index * WIDTH)


@inlined
def put(buffer: Any, index: int, x: Any) -> None:
    """Store a vector of a buffer; the index counts vectors."""
    _write_buffer(buffer, index * WIDTH, x)


@inlined
def vectors(count: int) -> Any:
    """Return an uninitialized buffer of vectors, each aligned to a cache line."""
    memory = np.empty((count + 1) * WIDTH, np.float32)
    start = -(memory.ctypes.data // _BYTES) % WIDTH
    return memory[start : start + count * WIDTH]


@inlined
def read(x: Any, i: int, j: int, k: int, channel: int, count: int) -> Any:
    """Load neighbouring channels of a tensor of four axes; lanes from `count` on are 0."""
    if count == WIDTH and x.strides[3] == _BYTES:
        return _read_row(x, i, j, k, channel)
    return _gather(x, i, j, k, channel, count)


@inlined
def write(x: Any, i: int, j: int, k: int, channel: int, count: int, value: Any) -> None:
    """Store the first `count` lanes to neighbouring channels of a tensor of four axes."""
    if count == WIDTH and x.strides[3] == _BYTES:
        _write_row(x, i, j, k, channel, value)
    else:
        _scatter(x, i, j, k, channel, count, value)


@called
def _gather(x: Any, i: int, j: int, k: int, channel: int, count: int) -> Any:
    if x.strides[3] == _BYTES:
        return _read_part(x, i, j, k, channel, count)
    value = broadcast(np.float32(0))
    for index in range(count):
        value = with_lane(value, index, x[i, j, k, channel + index])
    return value


@called
def _scatter(x: Any, i: int, j: int, k: int, channel: int, count: int, value: Any) -> None:
    if x.strides[3] == _BYTES:
        _write_part(x, i, j, k, channel, count, value)
        return
    for index in range(count):
        x[i, j, k, channel + index] = lane(value, index)
