"""Compiled code that may or may not be installed, imported at first use.

fambav.ops.triton    our kernels for a CUDA device, or any device under Triton's interpreter
fambav.ops.numba     our kernels for a CPU, with the same interface
Extension            another project's compiled package, such as mamba-ssm's
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fambav.ops import kept_states
from fambav.ops.dispatch import BackendError

PROCESS = os.getpid()  # that imported this module, whose forks do not inherit its threads


class KernelSet(NamedTuple):
    """A package of our kernels.

    Attributes:
        name: Of its compiler, its folder and its backends.
        device: Device type of the tensors it takes.
        dtypes: Of the tokens it takes.
        hint: How to install the compiler.
        kept_shape: Takes directions, batch, length, dim and state; returns the shape of the states
            that its scan keeps for the backward pass.
        installed: Whether the compiler is installed; a field, since `torch.compile` cannot trace
            `find_spec`.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    hint: str
    kept_shape: Callable[..., tuple[int, ...]]
    installed: bool

    def load(self) -> ModuleType:
        """Import the kernels.

        Raises:
            BackendError: If that fails, with the reason: a compiler that is installed and broken
                is not passed over in silence for a slower backend.
        """
        if not self.installed:
            raise BackendError(f"{self.name} is not installed; {self.hint}")
        return _kernels(self.name)

    def unavailable(self) -> str | None:
        """Return why none of them can run on this machine, or None."""
        if self.device == "cuda" and not torch.cuda.is_available() and not interpreted():
            return "torch sees no CUDA device"
        return None if self.installed else f"{self.name} is not installed; {self.hint}"

    def unsupported(self, *tensors: Tensor) -> str | None:
        """Return why the device or dtype of these tensors is unsupported, or None.

        Args:
            tensors: The first holds tokens, whose dtype counts.
        """
        any_device = self.device == "cuda" and interpreted()
        elsewhere = [t.device for t in tensors if t.device.type != self.device]
        if elsewhere and not any_device:
            return f"a tensor is on {elsewhere[0]}, expected {self.device}"
        if tensors[0].dtype not in self.dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"a tensor is {tensors[0].dtype}, expected {expected}"
        return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def on_gpu(*tensors: Tensor) -> bool:
    """Whether all tensors are on a CUDA device: the interpreter runs only where it is forced."""
    return all(t.is_cuda for t in tensors)


@functools.cache
def _kernels(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"fambav.ops.{name}")
    except ImportError as error:
        raise BackendError(f"import of {name} fails: {error}") from error


TRITON = KernelSet(
    "triton",
    device="cuda",
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    hint="it comes with CUDA builds of torch, or with pip install 'fambav[triton]'",
    kept_shape=kept_states.triton_shape,
    installed=find_spec("triton") is not None,
)
NUMBA = KernelSet(
    "numba",
    device="cpu",
    dtypes=(torch.float32,),
    hint="it comes with pip install 'fambav[cpu]'",
    kept_shape=kept_states.numba_shape,
    installed=find_spec("numba") is not None,
)
_sets = {kernels.name: kernels for kernels in (TRITON, NUMBA)}


def kernel_set(name: str) -> KernelSet:
    """Return one of the sets by name, "triton" or "numba"."""
    return _sets[name]


class Extension:
    """A compiled package of another project.

    Args:
        module: Its module.
        functions: Of that module, those that are called.
        package: That provides the module.
    """

    def __init__(self, module: str, *functions: str, package: str) -> None:
        self.module = module
        self.functions = functions
        self.package = package

    def unavailable(self) -> str | None:
        """Return why it cannot run on this machine, or None."""
        device = None if torch.cuda.is_available() else "torch sees no CUDA device"
        reasons = [r for r in (device, self.broken()) if r is not None]
        return "; ".join(reasons) or None

    def broken(self) -> str | None:
        """Return why it cannot be imported, or None."""
        module = _module(self.module)
        if isinstance(module, str):
            return f"{module}; see {self.package}"
        absent = [name for name in self.functions if not hasattr(module, name)]
        if absent:
            return f"{self.module} has no {absent[0]}, expected that of {self.package}"
        return None

    def call(self, function: str, *arguments: Any, **options: Any) -> Any:
        """Call a function of the package.

        Raises:
            BackendError: If the package cannot be imported, or takes other arguments.
        """
        reason = self.broken()
        if reason is not None:
            raise BackendError(reason)
        run: Callable[..., Any] = getattr(_module(self.module), function)
        try:
            return run(*arguments, **options)
        except TypeError as error:
            raise BackendError(
                f"{self.module}.{function} does not take our arguments: {_first_line(error)};"
                f" expected that of {self.package}"
            ) from error


@functools.cache
def _module(module: str) -> Any:
    """Return the imported module, or the reason why that failed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f"{module} is not installed"
        return f"import of {module} fails: {_first_line(error)}"
    except Exception as error:  # noqa: BLE001  compiled code can raise anything, which is reported
        return f"import of {module} fails: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def off_gpu(*tensors: Tensor) -> str | None:
    """Return which of these tensors is not on a CUDA device, or None."""
    elsewhere = [t.device for t in tensors if not t.is_cuda]
    return f"a tensor is on {elsewhere[0]}, expected a CUDA device" if elsewhere else None


def unsupported_dtype(dtype: torch.dtype) -> str | None:
    """Return that compiled kernels do not take this dtype, or None."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return f"a tensor is {dtype}, expected float32, float16 or bfloat16"
