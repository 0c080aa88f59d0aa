"""Every operation by one backend, as far as it has it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from fambav.ops import BackendError, backends, force
from fambav.ops.dispatch import SCAN
from fambav.ops.kernels import interpreted

SCANS = {  # what is compared where nothing else is asked for
    "cuda": ("triton", "cuda", "reference"),
    "cpu": ("numba", "cpu", "cuda", "reference"),
}


@contextmanager
def stack(backend: str | None) -> Iterator[None]:
    """Force a backend of the scan, and of every other operation that has it and can run it here.

    The others choose for themselves: beside mamba-ssm's scan, for instance, our norm.

    Args:
        backend: Its name; None lets all choose.

    Raises:
        BackendError: If the scan has no such backend.
    """
    with ExitStack() as forced:
        if backend is not None:
            forced.enter_context(force(backend))
            for op in _others(backend):
                forced.enter_context(force(backend, op))
        yield


@functools.cache
def _others(backend: str) -> tuple[str, ...]:
    """Return the other operations that have such a backend."""
    return tuple(op for op, n, reason in backends() if n == backend and op != SCAN and not reason)


def sift(
    names: Sequence[str] | None, device: torch.device, attempt: Callable[[str], object]
) -> tuple[list[str], dict[str, str]]:
    """Tell which backends can run here.

    Args:
        names: Backends to try; None for those that suit the device, and never an interpreter.
        device: Where.
        attempt: Makes one small forward pass by a backend.

    Returns:
        Those that can, and why each of the others cannot.
    """
    able, skipped = [], dict[str, str]()
    for name in SCANS[device.type] if names is None else names:
        if names is None and name == "triton" and interpreted():
            skipped[name] = "TRITON_INTERPRET is set"
            continue
        try:
            with stack(name), torch.no_grad():
                attempt(name)
        except BackendError as error:
            skipped[name] = str(error)
            continue
        able.append(name)
    return able, skipped
