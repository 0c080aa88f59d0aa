"""Operations with more than one implementation.  Import them from here."""

from fambav.ops.add_rms_norm import add_rms_norm
from fambav.ops.bimamba import bimamba_scan
from fambav.ops.causal_conv1d import causal_conv1d
from fambav.ops.dispatch import (
    BackendError,
    backends,
    check_environment,
    composed,
    force,
    set_backend,
)
from fambav.ops.fused_bimamba import Direction
from fambav.ops.match import Selection, match
from fambav.ops.nc_ssd import nc_ssd
from fambav.ops.pool import pool
from fambav.ops.scan_order import order_table
from fambav.ops.selective_scan import selective_scan

__all__ = [
    "BackendError",
    "Direction",
    "Selection",
    "add_rms_norm",
    "backends",
    "bimamba_scan",
    "causal_conv1d",
    "check_environment",
    "composed",
    "force",
    "match",
    "nc_ssd",
    "order_table",
    "pool",
    "selective_scan",
    "set_backend",
]
