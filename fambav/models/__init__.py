"""Backbones.  Importing this package registers them with timm."""

from importlib.util import find_spec

from fambav.models.vim import Trace, Vim
from fambav.models.weights import adapt, check_class_token, official, published_class_token

__all__ = ["Trace", "Vim", "adapt", "check_class_token", "official", "published_class_token"]

if find_spec("triton") is not None:  # without it torch's counter complains that it is not there
    from fambav.ops import flops as flops
