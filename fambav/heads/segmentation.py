"""A backbone and a head that labels its pixels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fambav.heads.upernet import FCNHead, UPerHead


class SegmentationModel(nn.Module):
    """Logits of each pixel from the feature maps of a backbone, at the size of the images.

    Args:
        backbone: Of timm's `features_only`: maps images to a list of (batch, channels, height,
            width), the finest one first, which its `feature_info.channels()` describes.
        num_classes: Logits of a pixel.
        channels: Inside the head.
        auxiliary: Map, by its index, that a second head labels while training; None for no head.

    Source: mmsegmentation's UPerNet; the second head's loss has the weight 0.4 there.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        channels: int = 512,
        auxiliary: int | None = -2,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        widths = backbone.feature_info.channels()
        self.auxiliary = auxiliary
        self.decode_head = UPerHead(widths, num_classes, channels=channels)
        self.auxiliary_head: FCNHead | None = None
        if auxiliary is not None:
            self.auxiliary_head = FCNHead(widths[auxiliary], num_classes, channels=channels // 2)

    @property
    def num_classes(self) -> int:
        """Logits of a pixel."""
        return self.decode_head.num_classes

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Label pixels: (batch, channels, height, width) -> (batch, num_classes, height, width).

        While training with a second head, a pair of such logits, the second head's behind.
        """
        maps = self.backbone(images)
        logits = _at(images, self.decode_head(maps))
        if self.auxiliary_head is None or self.auxiliary is None or not self.training:
            return logits
        return logits, _at(images, self.auxiliary_head(maps[self.auxiliary]))


def _at(images: Tensor, logits: Tensor) -> Tensor:
    size = images.shape[2:]
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
