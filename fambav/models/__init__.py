"""Backbones.  Importing this package registers them with timm."""

from importlib.util import find_spec

from fambav.models.isotropic import Isotropic, Trace
from fambav.models.plainmamba import PlainMamba
from fambav.models.vim import Vim
from fambav.models.weights import adapt, check_class_token, official, published_class_token

__all__ = [
    "Isotropic",
    "PlainMamba",
    "Trace",
    "Vim",
    "adapt",
    "check_class_token",
    "official",
    "published_class_token",
]

if find_spec("triton") is not None:  # without it torch's counter complains that it is not there
    from fambav.ops import flops as flops
