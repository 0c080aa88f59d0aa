"""Compilation, caching and launching of the kernels.

A kernel is compiled for one signature when its module is imported.  Its machine code is cached in
the folder of the source or, if that is not writable, in the user's cache.

A kernel takes tasks from a counter, without the GIL, in as many threads as PyTorch uses.  They are
PyTorch's own OpenMP threads: between its products these spin for milliseconds on the cores that
other threads would need.  A forked process does not inherit them and starts Python threads, as does
one without OpenMP.  They are never numba's: depending on its threading layer, numba aborts a forked
process or one that launches two kernels concurrently.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from fambav.ops import kept_states
from fambav.ops.kernels import PROCESS

_F = TypeVar("_F", bound=Callable[..., Any])


def digest(*sources: Path) -> str:
    """Return eight hexadecimal digits that depend on the content of every file."""
    content = [path.read_bytes() for path in sources]
    return hashlib.sha256(b"".join(content)).hexdigest()[:8]


# Part of the names in numba's cache, which checks the file of a kernel for changes, but not those
# of the functions and constants inlined into it.
_SOURCES = digest(*sorted(Path(__file__).parent.glob("*.py")), Path(kept_states.__file__))

_NOTHING = np.empty((0, 0, 0, 0), np.float32)

COUNTER = types.int64[::1]

_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # what a thread of an OpenMP team calls


def floats(axes: int) -> Any:
    """Return the type of a float32 tensor with any strides."""
    return types.Array(types.float32, axes, "A")


def kernel(*takes: Any) -> Callable[[_F], _F]:
    """Compile a function for this signature, or load it from the cache."""

    def decorate(function: _F) -> _F:
        function.__qualname__ = f"{function.__qualname__}_{_SOURCES}"
        compile_for = functools.partial(numba.njit, types.void(*takes), nogil=True)
        try:
            compiled = compile_for(cache=True)(function)
        except RuntimeError as error:  # no cache folder is writable
            warnings.warn(f"every process compiles it anew: {error}", stacklevel=2)
            compiled = compile_for()(function)
        return cast(_F, compiled)

    return decorate


def inlined(function: _F) -> _F:
    """Inline a function into each kernel that calls it."""
    return cast(_F, numba.njit(forceinline=True)(function))


def called(function: _F) -> _F:
    """Compile a function that kernels call on rare paths."""
    return cast(_F, numba.njit(function))


def emitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function from one that returns its signature and its LLVM code generator."""
    made: Callable[..., Any] = intrinsic(function)
    return made


@emitted
def next_task(typing: Any, counter: Any) -> Any:
    """Take the next task, atomically."""
    del typing

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), emit


def launch(
    function: Callable[..., None],
    tasks: int,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    *options: Any,
) -> None:
    """Run a kernel in as many threads as PyTorch uses.

    Args:
        function: The kernel.  It takes the counter of tasks, then what follows here; a tensor
            becomes a float32 array, which shares its memory if it is float32, and None an empty
            array of four axes.
        tasks: Their number.
        inputs: Tensors that the kernel reads.
        outputs: Tensors that the kernel writes.
        options: Its other arguments.
    """
    counter = np.zeros(1, np.int64)
    written = [None if x is None else x.detach().float() for x in outputs]
    read = [None if x is None else x.detach().float() for x in inputs]
    arrays = [_NOTHING if x is None else x.numpy() for x in (*read, *written)]
    _run(lambda: function(counter, *arrays, *options), tasks)
    for output, array in zip(outputs, written, strict=True):
        if output is not None and array is not None and output.dtype != array.dtype:
            output.copy_(array)


def _run(function: Callable[[], None], tasks: int) -> None:
    """Call a function in each of as many threads as PyTorch uses, but no more than tasks."""
    threads = torch.get_num_threads()
    if min(threads, tasks) < 2:
        function()
    elif os.getpid() == PROCESS and (parallel := _openmp()) is not None:
        _run_in_team(parallel, function, threads, min(threads, tasks))
    else:
        others = _others(os.getpid(), threads - 1)
        running = [others.submit(function) for _ in range(min(threads, tasks) - 1)]
        function()
        for run in running:
            if not run.cancel():  # a thread that has not started yet would get no task
                run.result()


def _run_in_team(
    parallel: Callable[..., None], function: Callable[[], None], threads: int, calls: int
) -> None:
    """Call a function in OpenMP's threads; all take part, since a smaller team ends the others."""
    members, errors = itertools.count(), list[BaseException]()

    def member(_: Any) -> None:
        try:
            if next(members) < calls:
                function()
        except BaseException as error:  # noqa: BLE001  C cannot raise it
            errors.append(error)

    parallel(_MEMBER(member), None, threads, 0)
    if errors:
        raise errors[0]


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """Return the function that runs another in a team of PyTorch's OpenMP threads, or None.

    It is that of GNU's runtime, which LLVM's and Intel's offer too.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # also looks in what the library loads
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return cast(Callable[..., None], parallel)


@functools.cache
def _others(process: int, count: int) -> ThreadPoolExecutor:
    """Return a thread pool of this process; a fork inherits no threads."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"fambav-{process}")
