"""Compiled packages that may or may not be there, and why not."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fambav.ops.dispatch import BackendError


class Extension:
    """A compiled package, imported at first use.

    Args:
        module: What is imported.
        functions: What is called in it.
        package: What is installed to get it.
    """

    def __init__(self, module: str, *functions: str, package: str) -> None:
        self.module = module
        self.functions = functions
        self.package = package

    def missing(self) -> str | None:
        """Say why this machine cannot run it, or None."""
        device = None if torch.cuda.is_available() else "torch sees no CUDA device"
        reasons = [r for r in (device, self.broken()) if r is not None]
        return "; ".join(reasons) or None

    def broken(self) -> str | None:
        """Say why it cannot be imported, or None."""
        found = _load(self.module)
        if isinstance(found, str):
            return f"{found}; see {self.package}"
        absent = [name for name in self.functions if not hasattr(found, name)]
        if absent:
            return f"{self.module} has no {absent[0]}, expected that of {self.package}"
        return None

    def call(self, function: str, *arguments: Any, **options: Any) -> Any:
        """Call one of the functions.

        Raises:
            BackendError: If the package cannot be imported, or takes other arguments.
        """
        reason = self.broken()
        if reason is not None:
            raise BackendError(reason)
        run: Callable[..., Any] = getattr(_load(self.module), function)
        try:
            return run(*arguments, **options)
        except TypeError as error:
            told = f"{self.module}.{function} does not take our arguments: {_first_line(error)}"
            raise BackendError(f"{told}; expected that of {self.package}") from error


@functools.cache
def _load(module: str) -> Any:
    """Import a module; return it, or a sentence that says why that failed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f"{module} is not installed"
        return f"import of {module} fails: {_first_line(error)}"
    except Exception as error:  # noqa: BLE001  compiled code fails in any way, and each is told
        return f"import of {module} fails: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def off_gpu(*tensors: Tensor) -> str | None:
    """Say which of these tensors is not on a CUDA device, or None."""
    elsewhere = [t.device for t in tensors if not t.is_cuda]
    return f"a tensor is on {elsewhere[0]}, expected a CUDA device" if elsewhere else None


def unsuited(dtype: torch.dtype) -> str | None:
    """Say that compiled kernels do not take a dtype, or None."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return f"a tensor is {dtype}, expected float32, float16 or bfloat16"
