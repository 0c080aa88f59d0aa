"""Backbones.  Importing this package registers them with timm."""

from fambav.models.vim import Trace, Vim
from fambav.models.weights import adapt, check_class_token, official, published_class_token

__all__ = ["Trace", "Vim", "adapt", "check_class_token", "official", "published_class_token"]
