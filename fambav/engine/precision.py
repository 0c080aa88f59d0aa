"""What decides the bits of a result: algorithms, matrix products, threads and number formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def determinism_settings(
    *, deterministic: bool, matmul_precision: str, threads: int | None = None
) -> Iterator[None]:
    """Set how torch computes, and put it back at the end.

    Args:
        deterministic: Use deterministic algorithms only; an operation that has none raises.
        matmul_precision: Of float32 products: "high" may use TF32 on a GPU, "highest" may not.
        threads: Of this process, at least 1; None for as many as torch takes.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    filled: Any = torch.utils.deterministic
    threads_before = torch.get_num_threads()
    fills = filled.fill_uninitialized_memory
    torch.set_float32_matmul_precision(matmul_precision)
    torch.set_num_threads(threads_before if threads is None else threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(mode=deterministic)
        # No result depends on memory that nobody wrote, which the tests prove by filling it.
        filled.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filled.fill_uninitialized_memory = fills
        torch.set_float32_matmul_precision(before[1])
        torch.set_num_threads(threads_before)


class Precision:
    """The number format of the forward pass, and the loss scale that fp16 needs.

    Args:
        device: Where the model runs.
        dtype: bfloat16 or float16 to compute products in; None for the weights' own.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device = device
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def name(self) -> str:
        """Short name of the format, as in a log."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def autocast(self, *, cached: bool = True) -> torch.autocast:
        """Return a context for the forward pass.

        Args:
            cached: Keep a converted weight until the end, instead of converting it at each use.
        """
        enabled = self.dtype is not None
        kind = self.device.type
        return torch.autocast(kind, dtype=self.dtype, enabled=enabled, cache_enabled=cached)
