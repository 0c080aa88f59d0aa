"""Buffers for what an operator needs only while it runs.

The memory that PyTorch's CPU allocator hands out has often gone back to the system in between, and
then each 4 KiB of it cost a page fault at the first write, which takes longer than the write.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LARGEST = 32 * 2**20  # bytes of a buffer that is kept

_kept = threading.local()  # a buffer for each name


def scratch(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialized tensor, whose memory the next call with this name uses again.

    Args:
        name: Of the buffer; each thread has its own.
        shape: Of the tensor.
        like: Has its dtype and device.  On another device than a CPU, or above `LARGEST`, the
            tensor is a new one.
    """
    size = math.prod(shape)
    if like.device.type != "cpu" or size * like.itemsize > LARGEST:
        return like.new_empty(shape)
    buffer: Tensor | None = getattr(_kept, name, None)
    if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
        with torch.inference_mode(mode=False):  # so that it may be written outside of it, too
            buffer = torch.empty(size, dtype=like.dtype)
        setattr(_kept, name, buffer)
    return buffer[:size].view(shape)
