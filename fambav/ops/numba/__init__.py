"""Numba kernels for CPUs: the norm, the convolution, the scan and the gate of a Mamba block."""

from fambav.ops.numba.backward_scan import scan_backward
from fambav.ops.numba.conv import conv_backward, conv_forward
from fambav.ops.numba.forward_scan import scan_forward
from fambav.ops.numba.gate import gate_backward, gate_forward
from fambav.ops.numba.norm import add_rms_norm_backward, add_rms_norm_forward

__all__ = [
    "add_rms_norm_backward",
    "add_rms_norm_forward",
    "conv_backward",
    "conv_forward",
    "gate_backward",
    "gate_forward",
    "scan_backward",
    "scan_forward",
]
