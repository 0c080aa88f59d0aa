"""Backbones and forecasters.  Importing this package registers them with timm."""

from importlib.util import find_spec

from fambav.models.backbone import Backbone, Trace
from fambav.models.cvmh_unet import CVMHUNet
from fambav.models.forecaster import DLinear, Forecaster
from fambav.models.groupmamba import GroupMamba
from fambav.models.hierarchical import Hierarchical
from fambav.models.model import Model
from fambav.models.plainmamba import PlainMamba
from fambav.models.segmenter import Segmenter
from fambav.models.timm_model import TimmModel
from fambav.models.tsm2 import TSM2
from fambav.models.vim import Vim
from fambav.models.vim2 import ViM2
from fambav.models.vmamba import VMamba
from fambav.models.vmunet import VMUNet
from fambav.models.vssd import VSSD
from fambav.models.weights import (
    adapt,
    check_class_token,
    is_classifier,
    official,
    published_class_token,
)

__all__ = [
    "TSM2",
    "VSSD",
    "Backbone",
    "CVMHUNet",
    "DLinear",
    "Forecaster",
    "GroupMamba",
    "Hierarchical",
    "Model",
    "PlainMamba",
    "Segmenter",
    "TimmModel",
    "Trace",
    "VMUNet",
    "VMamba",
    "ViM2",
    "Vim",
    "adapt",
    "check_class_token",
    "is_classifier",
    "official",
    "published_class_token",
]

if find_spec("triton") is not None:  # without it torch's counter complains that it is not there
    from fambav.ops import flop_formulas as flop_formulas
