"""Backbones and forecasters.  Importing this package registers them with timm."""

from importlib.util import find_spec

from fambav.models.backbone import Backbone, Trace
from fambav.models.forecaster import DLinear, Forecaster
from fambav.models.plainmamba import PlainMamba
from fambav.models.tsm2 import TSM2
from fambav.models.vim import Vim
from fambav.models.weights import (
    adapt,
    check_class_token,
    is_classifier,
    official,
    published_class_token,
)

__all__ = [
    "TSM2",
    "Backbone",
    "DLinear",
    "Forecaster",
    "PlainMamba",
    "Trace",
    "Vim",
    "adapt",
    "check_class_token",
    "is_classifier",
    "official",
    "published_class_token",
]

if find_spec("triton") is not None:  # without it torch's counter complains that it is not there
    from fambav.ops import flop_formulas as flop_formulas
