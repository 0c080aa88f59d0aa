"""Heads that label pixels or find boxes, on the feature maps of any backbone.

    backbone = timm.create_model("vmamba_tiny_s1l8")
    model = SegmentationModel(backbone, num_classes=150)

Names of parameters are those of OpenMMLab's mmsegmentation, whose published weights load; in a
`Detector` they are torchvision's.
"""

from fambav.heads.detection import Detector
from fambav.heads.headed import MAPS, HeadedModel
from fambav.heads.segmentation import SegmentationModel
from fambav.heads.upernet import ConvNorm, FCNHead, UPerHead

__all__ = [
    "MAPS",
    "ConvNorm",
    "Detector",
    "FCNHead",
    "HeadedModel",
    "SegmentationModel",
    "UPerHead",
]
