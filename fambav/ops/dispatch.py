"""Choosing an implementation of an operation.

Every operation has a table of backends in the order tried; the last is the reference and refuses
nothing.  The choice looks only at devices, dtypes and shapes, so equal calls take equal paths.

A backend may be forced with `force`, with `set_backend`, or for the scan with FAMBAV_BACKEND.  A
forced backend that cannot run raises `BackendError`: asking for one implementation and silently
getting another is how measurements go wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCAN = "selective_scan"


class BackendError(RuntimeError):
    """A backend was forced and cannot run."""


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; the meta device has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off inside, on the device of x."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def never(*tensors: Tensor | None) -> str | None:
    """Refuse nothing."""
    del tensors
    return None


def always(*tensors: Tensor | None) -> bool:
    """Stand for any call."""
    del tensors
    return True


class Backend(NamedTuple):
    """One implementation of an operation.

    Attributes:
        name: What it is called when forced.
        run: The implementation.
        refuses: Takes the tensors of a call; says why they cannot run here, or None.
        missing: Says why this machine cannot run any call, or None.
        default: Takes the tensors of a call; whether it may be chosen unasked.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = never
    missing: Callable[[], str | None] = never
    default: Callable[..., bool] = always


class Table:
    """The backends of one operation, in the order tried.

    Args:
        op: Name of the operation.
        backends: Its implementations; the last one refuses nothing.
        follows: An operation that this one is made of.  What is forced there is forced here too;
            a backend that is not in this table forces the last one, which calls that operation.
    """

    def __init__(self, op: str, *backends: Backend, follows: str | None = None) -> None:
        self.op = op
        self.backends = backends
        self.follows = follows
        _tables[op] = self

    def __getitem__(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.backends)
        raise BackendError(f"backend of {self.op} is {name!r}, expected one of {known}")

    def pick(self, *tensors: Tensor | None) -> Callable[..., Any]:
        """Return the first implementation that runs `tensors`, or the forced one.

        Raises:
            BackendError: If the forced backend is unknown or refuses.
        """
        forced = self._forced()
        if forced is None:
            return next(
                b.run for b in self.backends if b.default(*tensors) and not _refusal(b, tensors)
            )
        backend = self[forced]
        reason = _refusal(backend, tensors)
        if reason is not None:
            raise BackendError(f"backend {forced!r} of {self.op} cannot run: {reason}")
        return backend.run

    def _forced(self) -> str | None:
        own = _forced.get(self.op)
        theirs = None if self.follows is None else _forced.get(self.follows)
        if own is not None or theirs is None:
            return own
        fused = any(backend.name == theirs for backend in self.backends)
        return theirs if fused else self.backends[-1].name


_tables: dict[str, Table] = {}
_forced: dict[str, str | None] = {SCAN: os.environ.get("FAMBAV_BACKEND") or None}


def _refusal(backend: Backend, tensors: tuple[Tensor | None, ...]) -> str | None:
    return backend.refuses(*tensors) or backend.missing()


@contextmanager
def force(backend: str | None, op: str = SCAN) -> Iterator[None]:
    """Use one backend of `op` for every call inside the block.

    Args:
        backend: Name in the operation's table; None lets the table choose.
        op: Name of the operation.

    Raises:
        BackendError: If the operation has no such backend.
    """
    if backend is not None:
        _table(op)[backend]
    previous, _forced[op] = _forced.get(op), backend
    try:
        yield
    finally:
        _forced[op] = previous


def set_backend(backend: str | None, op: str = SCAN) -> None:
    """Use one backend of `op` from now on, in this process.

    Args:
        backend: Name in the operation's table; None lets the table choose.
        op: Name of the operation.

    Raises:
        BackendError: If the operation has no such backend, or this machine cannot run it.
    """
    if backend is not None:
        reason = _table(op)[backend].missing()
        if reason is not None:
            raise BackendError(f"backend {backend!r} of {op} cannot run: {reason}")
    _forced[op] = backend


def backends() -> list[tuple[str, str, str | None]]:
    """List (operation, backend, why it cannot run on this machine or None)."""
    return [(table.op, b.name, b.missing()) for table in _tables.values() for b in table.backends]


def _table(op: str) -> Table:
    if op not in _tables:
        raise BackendError(f"operation is {op!r}, expected one of {', '.join(_tables)}")
    return _tables[op]


def expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Check the shape of an argument.

    Raises:
        ValueError: If it is another.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def expect_beside(name: str, tensor: Tensor, shape: tuple[int, ...], first: Tensor) -> None:
    """Check the shape of an argument, that it holds real numbers, and that it is where `first` is.

    Raises:
        ValueError: If one of them is another.
    """
    expect(name, tensor, shape)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, expected a floating-point dtype")
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {first.device}")
