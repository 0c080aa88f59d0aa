"""Backend dispatch: which implementation of an operation runs.

Every operation has a table of backends in order of preference; the last is the reference and
supports everything.  The choice is deterministic: it depends on devices, dtypes and shapes alone.

A backend may be forced with `force`, with `set_backend`, or for the scan with FAMBAV_BACKEND.  A
forced backend that cannot run raises `BackendError`; there is no silent fallback.

Backends before the reference have first derivatives in reverse mode alone.  What needs more, second
derivatives, forward mode or a transform of `torch.func`, they refuse; `composed` runs the
references, which are PyTorch's own operations and have them all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fambav.arguments import refusal
from fambav.short_repr import short_repr

SCAN = "selective_scan"
COMPOSED_HINT = "call it inside `with fambav.composed():`"


class BackendError(RuntimeError):
    """A backend was forced and cannot run."""


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; the meta device has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off inside, on the device of x."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def no_reason(*tensors: Tensor | None) -> str | None:
    """Return None: everything is supported."""
    del tensors
    return None


def always(*tensors: Tensor | None) -> bool:
    """Return True: eligible by default for any tensors."""
    del tensors
    return True


class Backend(NamedTuple):
    """One implementation of an operation.

    Attributes:
        name: By which it is forced.
        run: The implementation.
        unsupported: Takes the tensors of a call; returns why it cannot run them, or None.
        unavailable: Returns why it cannot run on this machine at all, or None.
        default: Takes the tensors of a call; whether it is eligible when no backend is forced.
    """

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None] = no_reason
    unavailable: Callable[[], str | None] = no_reason
    default: Callable[..., bool] = always


class Table:
    """The backends of one operation, in order of preference.

    Args:
        op: Name of the operation.
        backends: Its implementations; the last one supports everything.
        follows: An operation that the reference of this one calls.  A backend forced there is
            forced here too; if this table lacks it, the last backend runs, which calls that
            operation.
        differentiable: Whether results have derivatives; others are the same under any transform.
    """

    def __init__(
        self,
        op: str,
        *backends: Backend,
        follows: str | None = None,
        differentiable: bool = True,
    ) -> None:
        self.op = op
        self.backends = backends
        self.follows = follows
        self.differentiable = differentiable
        _tables[op] = self

    def __getitem__(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.backends)
        raise BackendError(f"backend of {self.op} is {short_repr(name)}, expected one of {known}")

    def pick(self, *tensors: Tensor | None) -> Callable[..., Any]:
        """Return the forced implementation, or the first that supports `tensors`.

        Kernels are never launched over an empty batch: there the reference runs.

        Args:
            tensors: Of the call; the first has the batch.

        Raises:
            BackendError: If the forced backend is unknown or cannot run, or if the call is under a
                transform that only the reference knows.
        """
        reference = self.backends[-1]
        if _composed_blocks:
            return reference.run
        backend = self._chosen(tensors)
        if tensors[0] is not None and not tensors[0].numel():
            return reference.run
        refuses = self.differentiable and backend is not reference
        if refuses and (transform := transform_above()) is not None:
            raise BackendError(
                f"{self.op} is under {transform}, which its backend {backend.name!r} does not"
                f" support; {COMPOSED_HINT}"
            )
        return backend.run

    def _chosen(self, tensors: tuple[Tensor | None, ...]) -> Backend:
        """Return the forced backend, or the first that supports `tensors`."""
        forced = self._forced()
        if forced is None:
            return next(b for b in self.backends if b.default(*tensors) and not _reason(b, tensors))
        backend = self[forced]
        reason = _reason(backend, tensors)
        if reason is not None:
            raise BackendError(f"backend {forced!r} of {self.op} cannot run: {reason}")
        return backend

    def _forced(self) -> str | None:
        own = _forced.get(self.op)
        followed = None if self.follows is None else _forced.get(self.follows)
        if own is not None or followed is None:
            return own
        known = any(backend.name == followed for backend in self.backends)
        return followed if known else self.backends[-1].name


_tables: dict[str, Table] = {}
_environment = os.environ.get("FAMBAV_BACKEND") or None
_forced: dict[str, str | None] = {SCAN: _environment}
_composed_blocks, _composed_lock = 0, threading.Lock()  # that are open


def _reason(backend: Backend, tensors: tuple[Tensor | None, ...]) -> str | None:
    return backend.unsupported(*tensors) or backend.unavailable()


@contextmanager
def force(backend: str | None, op: str = SCAN) -> Iterator[None]:
    """Use one backend of `op` for every call inside the block.

    Args:
        backend: Name in the operation's table; None lets the table choose.
        op: Name of the operation.

    Raises:
        BackendError: If the operation has no such backend.
    """
    table = _table(op)
    if backend is not None:
        table[backend]
    previous, _forced[op] = _forced.get(op), backend
    try:
        yield
    finally:
        _forced[op] = previous


@contextmanager
def composed() -> Iterator[None]:
    """Run every operation by its reference inside the block, whatever backend is forced.

    References are composed of PyTorch's own operations.  They take longer and more memory, but have
    second derivatives and forward-mode ones, and take the transforms of `torch.func`.

    Blocks may nest and overlap in several threads.  While one is open in any thread they hold for
    all, as backward passes run in threads of PyTorch's own.
    """
    global _composed_blocks  # not of a thread, for which torch.compile has no guards
    with _composed_lock:
        _composed_blocks += 1
    try:
        yield
    finally:
        with _composed_lock:
            _composed_blocks -= 1


def transform_above() -> str | None:
    """Name what differentiates or batches the present call from outside, other than backward.

    Returns:
        A transform of `torch.func` or forward-mode differentiation, which tensors do not show; None
        for neither.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


# As `torch.compiler.assume_constant_result` does, which would import the compiler.  A compiler that
# traces runs it, and guards transforms and the level of forward mode by itself.
transform_above._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plain_autograd() -> bool:
    """Whether nothing but PyTorch's own operations may run, without `autograd.Function`.

    So it is under a transform, and for torch.jit.trace, which could not save such a function.
    """
    return torch.jit.is_tracing() or transform_above() is not None  # type: ignore[attr-defined]


def in_strides_of(like: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return y in the strides of a tensor of its shape, and in this dtype."""
    if transform_above() is not None:  # there no tensor takes what a wrapped one holds
        return y.to(dtype)
    return torch.empty_like(like, dtype=dtype).copy_(y)


def set_backend(backend: str | None, op: str = SCAN) -> None:
    """Use one backend of `op` from now on, in this process.

    Args:
        backend: Name in the operation's table; None lets the table choose.
        op: Name of the operation.

    Raises:
        BackendError: If the operation has no such backend, or this machine cannot run it.
    """
    table = _table(op)
    if backend is not None:
        reason = table[backend].unavailable()
        if reason is not None:
            raise BackendError(f"backend {backend!r} of {op} cannot run: {reason}")
    _forced[op] = backend


def check_environment() -> None:
    """Refuse a scan that FAMBAV_BACKEND forces and that cannot run, before anything is done.

    Raises:
        BackendError: If there is no such backend, or this machine cannot run it.
    """
    if _environment is None or _forced[SCAN] != _environment:  # another is forced by now
        return
    known = {backend.name: backend for backend in _table(SCAN).backends}
    if _environment not in known:
        raise BackendError(
            f"FAMBAV_BACKEND is {_environment!r}, expected one of {', '.join(known)}"
        )
    reason = known[_environment].unavailable()
    if reason is not None:
        raise BackendError(
            f"FAMBAV_BACKEND is {_environment!r}, expected a backend that can run here; {reason}"
        )


def backends() -> list[tuple[str, str, str | None]]:
    """List (operation, backend, why it is unavailable on this machine or None)."""
    return [
        (table.op, b.name, b.unavailable()) for table in _tables.values() for b in table.backends
    ]


def _table(op: str) -> Table:
    if not isinstance(op, str) or op not in _tables:
        raise BackendError(f"operation is {short_repr(op)}, expected one of {', '.join(_tables)}")
    return _tables[op]


def expect_tensors(**arguments: Any) -> None:
    """Check that arguments are tensors.

    Raises:
        ValueError: If one is something else.
    """
    for name, value in arguments.items():
        _expect_tensor(name, value)


def _expect_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise refusal(name, value, "a tensor")


def expect_dtype(name: str, dtype: Any) -> None:
    """Check that an argument is a floating-point dtype.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise refusal(name, dtype, "a floating-point dtype such as torch.float32")


def expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Check that an argument is a tensor of this shape.

    Raises:
        ValueError: If it is not.
    """
    _expect_tensor(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def expect_beside(name: str, tensor: Tensor, shape: tuple[int, ...], first: Tensor) -> None:
    """Check that an argument has this shape, a floating-point dtype, and the device of `first`.

    Raises:
        ValueError: If it has not.
    """
    if not isinstance(tensor, Tensor) or tensor.shape != shape:
        expect(name, tensor, shape)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, expected a floating-point dtype")
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {first.device}")
