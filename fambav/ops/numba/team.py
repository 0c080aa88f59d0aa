"""Kernels in PyTorch's own OpenMP threads.

Those spin for milliseconds after each of PyTorch's products, on the cores that other threads would
need.  They take no GIL: a C function unpacks the arguments, and calls the kernel.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock

_WORD = ir.IntType(64)
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def openmp() -> Callable[..., None] | None:
    """Return the function that runs another in a team of PyTorch's OpenMP threads, or None.

    It is that of GNU's runtime, which LLVM's and Intel's offer too.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # also looks in what the library loads
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (_ENTRY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return cast(Callable[..., None], parallel)


def run_in_team(
    parallel: Callable[..., None], function: Any, threads: int, arguments: Iterable[Any]
) -> None:
    """Call a kernel in each of PyTorch's threads.

    Args:
        parallel: As returned by `openmp`.
        function: The kernel, compiled for one signature.
        threads: As many as PyTorch uses: a smaller team would end the others.
        arguments: Of the kernel: arrays and numbers.

    Raises:
        MemoryError: If it fails, which is for want of memory for its buffers.
    """
    words = [0]
    for is_float, x in zip(_floats(function), arguments, strict=True):
        if type(x) is np.ndarray:
            address = x.__array_interface__["data"][0]  # faster than by `x.ctypes`
            words += (0, 0, x.size, x.itemsize, address, *x.shape, *x.strides)
        else:
            words.append(int(np.float32(x).view(np.int32)) if is_float else int(x))
    packed = np.array(words, np.int64)  # as numba lays arguments out, in words of 8 bytes
    parallel(_entry(function)[0], packed.ctypes.data, threads, 0)
    if packed[0]:
        raise MemoryError(f"{function.py_func.__name__} fails, expected memory for its buffers")


@functools.cache
def _floats(function: Any) -> tuple[bool, ...]:
    """Return which arguments of a kernel are single floats."""
    return tuple(kind == types.float32 for kind in function.signatures[0])


@global_compiler_lock
@functools.cache
def _entry(function: Any) -> tuple[Any, Any]:
    """Return a C function that calls a kernel, given the address of its packed arguments.

    Its first word is set if the kernel fails.  Beside it is what keeps its code in memory.
    """
    (compiled,) = function.overloads.values()
    context, of = compiled.target_context, compiled.fndesc
    address = compiled.library.get_pointer_to_function(of.llvm_func_name)
    llvmlite.binding.add_symbol(of.llvm_func_name, address)
    library = context.codegen().create_library(f"entry of {of.llvm_func_name}")
    module = library.create_ir_module(library.name)
    name = f"entry_{of.llvm_func_name}"
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), [_WORD.as_pointer()]), name)
    builder, at, arguments = ir.IRBuilder(entry.append_basic_block()), 1, []
    for kind in of.argtypes:
        place = builder.gep(entry.args[0], [_WORD(at)])
        value_type = context.get_value_type(kind)
        if isinstance(kind, types.Array) or kind == types.float32:
            value = builder.load(builder.bitcast(place, value_type.as_pointer()))
        else:
            value = builder.load(place)
            value = value if value_type == _WORD else builder.trunc(value, value_type)
        arguments.append(value)
        at += 5 + 2 * kind.ndim if isinstance(kind, types.Array) else 1
    callee = context.declare_function(module, of)
    status, _ = context.call_conv.call_function(builder, callee, of.restype, of.argtypes, arguments)
    with builder.if_then(status.is_error):
        builder.store(_WORD(1), entry.args[0])
    builder.ret_void()
    library.add_ir_module(module)
    library.finalize()
    return _ENTRY(library.get_pointer_to_function(name)), library
