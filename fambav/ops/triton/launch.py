"""What every launch of a Triton kernel needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Element types of pointers, in Triton's words, for the table of ahead-of-time variants.
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

# Contraction to fused multiply-add is asked for, since newer Tritons turn it off by default, and no
# loop is pipelined through shared memory: scratch that a loop stores is read back by the next one.
OPTIONS: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": True}


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """Make the device of a tensor current: Triton launches on the current one."""
    return torch.cuda.device_of(tensor)
