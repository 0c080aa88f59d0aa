"""Triton kernels, imported at first use; `triton` below is the library."""

from fambav.ops.triton.conv import conv_backward, conv_forward
from fambav.ops.triton.gate import gate_backward, gate_forward
from fambav.ops.triton.norm import add_rms_norm_backward, add_rms_norm_forward
from fambav.ops.triton.parameters import finish_gradients, pack_parameters
from fambav.ops.triton.pool import pool_backward, pool_forward
from fambav.ops.triton.scan_backward import scan_backward
from fambav.ops.triton.scan_forward import scan_forward

__all__ = [
    "add_rms_norm_backward",
    "add_rms_norm_forward",
    "conv_backward",
    "conv_forward",
    "finish_gradients",
    "gate_backward",
    "gate_forward",
    "pack_parameters",
    "pool_backward",
    "pool_forward",
    "scan_backward",
    "scan_forward",
]
