"""How the kernels are compiled, kept on disk and started.

A kernel is compiled for one list of types when its module is imported.  Its machine code is kept in
the folder of the source or, if nothing can be written there, in the user's cache.

A kernel takes tasks until none is left, without Python's lock, in as many threads as PyTorch uses.
They are Python's and not numba's: numba's come from whichever library it finds, and depending on
that end a process that was forked, or one that starts two kernels at once.
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
from numba.extending import intrinsic
from torch import Tensor

from fambav.ops import kept_states

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


def kernel(*takes: Any) -> Callable[[_F], _F]:
    """Compile a function for the types that it takes, or load what another process compiled."""

    def decorate(function: _F) -> _F:
        function.__qualname__ = f"{function.__qualname__}_{_SOURCES}"
        compile_for = functools.partial(numba.njit, types.void(*takes), nogil=True)
        try:
            compiled = compile_for(cache=True)(function)
        except RuntimeError as error:  # there is no folder to write to
            warnings.warn(f"every process compiles it anew: {error}", stacklevel=2)
            compiled = compile_for()(function)
        return cast(_F, compiled)

    return decorate


def inlined(function: _F) -> _F:
    """Make a function part of each kernel that calls it."""
    return cast(_F, numba.njit(forceinline=True)(function))


def called(function: _F) -> _F:
    """Make a function that kernels call, for what they seldom do."""
    return cast(_F, numba.njit(function))


def emitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function from one that returns its signature and what emits its instructions."""
    made: Callable[..., Any] = intrinsic(function)
    return made


@emitted
def next_task(typing: Any, counter: Any) -> Any:
    """Take the number of a task that no other thread has."""
    del typing

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

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
        function: The kernel.  It takes the counter that gives out tasks, then what follows here; a
            tensor becomes an array of float32, over the same memory if it is float32, and None an
            array of four axes with no numbers.
        tasks: How many there are.
        inputs: What the kernel reads.
        outputs: What the kernel writes.
        options: Its other arguments.
    """
    counter = np.zeros(1, np.int64)
    places = [None if x is None else x.detach().float() for x in outputs]
    read = [None if x is None else x.detach().float() for x in inputs]
    arrays = [_NOTHING if x is None else x.numpy() for x in (*read, *places)]
    threads = torch.get_num_threads()
    running = []
    if threads > 1:
        others = _others(os.getpid(), threads - 1)
        for _ in range(min(threads, tasks) - 1):
            running.append(others.submit(function, counter, *arrays, *options))
    function(counter, *arrays, *options)
    for run in running:
        if not run.cancel():  # what has not begun by now would find no task
            run.result()
    for output, place in zip(outputs, places, strict=True):
        if output is not None and place is not None and output.dtype != place.dtype:
            output.copy_(place)


@functools.cache
def _others(process: int, count: int) -> ThreadPoolExecutor:
    """Return threads that wait for work; a forked process has none of its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"fambav-{process}")
