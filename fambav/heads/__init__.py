"""Heads that label pixels, on the feature maps of any backbone.

    backbone = timm.create_model("vmamba_tiny_s1l8")
    model = SegmentationModel(backbone, num_classes=150)

Names of parameters are those of OpenMMLab's mmsegmentation, whose published weights load.
"""

from fambav.heads.segmentation import MAPS, SegmentationModel
from fambav.heads.upernet import ConvNorm, FCNHead, UPerHead

__all__ = ["MAPS", "ConvNorm", "FCNHead", "SegmentationModel", "UPerHead"]
