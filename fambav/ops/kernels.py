"""Sets of compiled kernels that share one interface, imported at first use.

    triton_kernels     for a CUDA device, or any device under Triton's interpreter
    numba_kernels      for a CPU

What a set offers, shapes included, is said where it is called: `scan_forward`, `conv_forward`,
`gate_forward` and their backward parts.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fambav.ops.dispatch import BackendError


class KernelSet(NamedTuple):
    """A package of kernels that may or may not run here.

    Attributes:
        name: What its backends are called.
        device: Type of the tensors it takes.
        dtypes: Of the tokens it takes.
        hint: How to get the compiler.
        installed: Whether the compiler is there; asked beforehand, since `torch.compile` cannot
            look into an import.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    hint: str
    installed: bool

    def load(self) -> ModuleType:
        """Import the kernels.

        Raises:
            BackendError: If that fails.
        """
        if not self.installed:
            raise BackendError(f"{self.name} is not installed; {self.hint}")
        return _import(self.name)

    def missing(self) -> str | None:
        """Say why this machine cannot run any of them, or None."""
        if self.device == "cuda" and not torch.cuda.is_available() and not interpreted():
            return "torch sees no CUDA device"
        return None if self.installed else f"{self.name} is not installed; {self.hint}"

    def refuses(self, *tensors: Tensor) -> str | None:
        """Say why these tensors cannot run here, or None; the first one holds tokens."""
        interprets = self.device == "cuda" and interpreted()
        elsewhere = [t.device for t in tensors if t.device.type != self.device]
        if elsewhere and not interprets:
            return f"a tensor is on {elsewhere[0]}, expected {self.device}"
        if tensors[0].dtype not in self.dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"a tensor is {tensors[0].dtype}, expected {expected}"
        return None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, step by step, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def on_gpu(*tensors: Tensor) -> bool:
    """Whether all tensors are on a CUDA device: the interpreter runs only where it is asked for."""
    return all(t.is_cuda for t in tensors)


@functools.cache
def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"fambav.ops.{name}_kernels")
    except ImportError as error:
        raise BackendError(f"import of {name} fails: {error}") from error


TRITON = KernelSet(
    "triton",
    device="cuda",
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    hint="it comes with CUDA builds of torch, or with pip install 'fambav[triton]'",
    installed=find_spec("triton") is not None,
)
NUMBA = KernelSet(
    "numba",
    device="cpu",
    dtypes=(torch.float32,),
    hint="it comes with pip install 'fambav[cpu]'",
    installed=find_spec("numba") is not None,
)
_sets = {kernels.name: kernels for kernels in (TRITON, NUMBA)}


def kernel_set(name: str) -> KernelSet:
    """Return one of the sets by name, "triton" or "numba"."""
    return _sets[name]
