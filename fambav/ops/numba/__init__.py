"""Numba kernels for CPUs: what a Mamba block does, and the matching and the means of tokens."""

from fambav.ops.numba.backward_scan import scan_backward
from fambav.ops.numba.conv import conv_backward, conv_forward
from fambav.ops.numba.forward_scan import scan_forward
from fambav.ops.numba.gate import gate_backward, gate_forward
from fambav.ops.numba.match import choose_pairs, patches_of
from fambav.ops.numba.pool import pool_backward, pool_forward

__all__ = [
    "choose_pairs",
    "conv_backward",
    "conv_forward",
    "gate_backward",
    "gate_forward",
    "patches_of",
    "pool_backward",
    "pool_forward",
    "scan_backward",
    "scan_forward",
]
