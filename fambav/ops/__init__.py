"""Operations with more than one implementation.  Import them from here."""

from fambav.ops.conv import causal_conv1d
from fambav.ops.dispatch import BackendError, backends, force, set_backend
from fambav.ops.norm import add_rms_norm
from fambav.ops.selective_scan import selective_scan

__all__ = [
    "BackendError",
    "add_rms_norm",
    "backends",
    "causal_conv1d",
    "force",
    "selective_scan",
    "set_backend",
]
