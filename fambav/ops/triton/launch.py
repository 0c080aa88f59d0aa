"""Launch options shared by all Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Pointer types by dtype, in Triton's notation, for ahead-of-time variants.
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

# FMA contraction is enabled explicitly, since newer Tritons disable it by default.  Loops are not
# software-pipelined through shared memory: scratch that one loop stores is loaded by the next.
OPTIONS: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": True}


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """Make the device of a tensor current, on which Triton launches."""
    return torch.cuda.device_of(tensor)
