"""Compilation, caching and launching of the kernels.

A kernel is compiled for one signature when its module is imported.  Its machine code is cached in
the folder of the source or, if that is not writable, in the user's cache.

A kernel takes tasks from a counter, without the GIL, in as many threads as PyTorch uses.  They are
PyTorch's own, see `team`; a forked process does not inherit these and starts Python threads, as
does one without OpenMP.  They are never numba's: depending on its threading layer, numba aborts a
forked process or one that launches two kernels concurrently.
"""

from __future__ import annotations

import functools
import hashlib
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
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic
from torch import Tensor

from fambav.ops import kept_states
from fambav.ops.kernels import PROCESS
from fambav.ops.numba.team import openmp, run_in_team

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


def floats(axes: int) -> Any:
    """Return the type of a float32 tensor with any strides."""
    return types.Array(types.float32, axes, "A")


def indices(axes: int) -> Any:
    """Return the type of an int64 tensor with any strides."""
    return types.Array(types.int64, axes, "A")


def kernel(*takes: Any) -> Callable[[_F], _F]:
    """Compile a function for this signature, or load it from the cache."""

    def decorate(function: _F) -> _F:
        function.__qualname__ = f"{function.__qualname__}_{_SOURCES}"
        options = dict(nogil=True, error_model="numpy")  # a division by zero is no error
        compile_for = functools.partial(numba.njit, types.void(*takes), **options)
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
        options: Its other arguments: numbers, and arrays of other dtypes, which it may write too.
    """
    counter = np.zeros(1, np.int64)
    written = [None if x is None else x.detach().float() for x in outputs]
    read = [None if x is None else x.detach().float() for x in inputs]
    arrays = [_NOTHING if x is None else x.numpy() for x in (*read, *written)]
    arguments = counter, *arrays, *options
    threads = torch.get_num_threads()
    if min(threads, tasks) < 2:
        function(*arguments)
    elif isinstance(function, Dispatcher) and os.getpid() == PROCESS and (team := openmp()):
        run_in_team(team, function, threads, arguments)
    else:
        _run_in_python(function, threads, tasks, arguments)
    for output, array in zip(outputs, written, strict=True):
        if output is not None and array is not None and output.dtype != array.dtype:
            output.copy_(array)


def _run_in_python(
    function: Callable[..., None], threads: int, tasks: int, arguments: tuple[Any, ...]
) -> None:
    """Call a function in Python threads, of which one is the present one."""
    others = _others(os.getpid(), threads - 1)
    running = [others.submit(function, *arguments) for _ in range(min(threads, tasks) - 1)]
    function(*arguments)
    for run in running:
        if not run.cancel():  # a thread that has not started yet would get no task
            run.result()


@functools.cache
def _others(process: int, count: int) -> ThreadPoolExecutor:
    """Return a thread pool of this process; a fork inherits no threads."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"fambav-{process}")
