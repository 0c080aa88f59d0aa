"""A backbone and a head that labels its pixels."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from fambav.heads.headed import MAPS, HeadedModel
from fambav.heads.library import LibraryHead
from fambav.heads.upernet import FCNHead, UPerHead
from fambav.models import TimmModel
from fambav.models.flops import Cost
from fambav.registry import HEADS, LIBRARY_HEADS

_DECODER, _AUXILIARY = "decode_head", "auxiliary_head"


class SegmentationModel(HeadedModel):
    """Logits of each pixel from the feature maps of a backbone, at the size of the images.

    Names of parameters are those of mmsegmentation: backbone., decode_head., auxiliary_head.

    Args:
        backbone: As for `HeadedModel`.
        num_classes: Logits of a pixel.
        head: "upernet", "fcn", which reads the last map alone, or a name of
            `fambav.registry.LIBRARY_HEADS`.
        channels: Inside the first two.
        auxiliary: Map, by its index, that a second head labels while training; None for no head.

    Raises:
        ValueError: If there is no such head, or as `LibraryHead`.

    Source: mmsegmentation's UPerNet; the second head's loss has the weight 0.4 there.
    """

    classifier_name = f"{_DECODER}.conv_seg"
    outer = (f"{_DECODER}.", f"{_AUXILIARY}.")
    head_task = "segmentation"

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        head: str = "upernet",
        channels: int = 512,
        auxiliary: int | None = -2,
    ) -> None:
        super().__init__(backbone, num_classes, read=2 if head == "fcn" else MAPS)
        widths = [each["num_chs"] for each in self.map_info]
        self.head, self.auxiliary = head, auxiliary
        self.decode_head: UPerHead | FCNHead | LibraryHead
        if head in LIBRARY_HEADS:
            name = self.backbone.pretrained_cfg["architecture"]
            strides = [each["reduction"] for each in self.map_info]
            self.decode_head = LibraryHead(head, name, strides=strides, num_classes=num_classes)
        elif head == "upernet":
            self.decode_head = UPerHead(widths, num_classes, channels=channels)
        elif head == "fcn":
            self.decode_head = FCNHead(widths[-1], num_classes, channels=channels)
        else:
            raise ValueError(f"head is {head!r}, expected one of {', '.join(HEADS)}")
        self.auxiliary_head: FCNHead | None = None
        if auxiliary is not None:
            self.auxiliary_head = FCNHead(widths[auxiliary], num_classes, channels=channels // 2)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Label pixels: (batch, channels, height, width) -> (batch, num_classes, height, width).

        While training with a second head, a pair of such logits, the second head's behind.
        """
        maps = self.maps(images)
        logits = _at(images, self.decode_head(maps[-1] if self.head == "fcn" else maps))
        if self.auxiliary_head is None or self.auxiliary is None or not self.training:
            return logits
        return logits, _at(images, self.auxiliary_head(maps[self.auxiliary]))

    def head_cost(self) -> Cost:
        """Return what the head costs an image; the auxiliary one is for training alone.

        Raises:
            ValueError: If the backbone or the head is not ours.
        """
        if isinstance(self.decode_head, LibraryHead) or not isinstance(self.backbone, TimmModel):
            what = f"{type(self.backbone).__name__} with head {self.head}"
            raise ValueError(f"model is a {what}, expected a backbone and a head of ours")
        stages, indices = self.info.stages, cast("list[int]", self.indices)
        grids = [stages[n if len(stages) > 1 else 0].grid for n in indices]
        return self.decode_head.cost(grids)


def _at(images: Tensor, logits: Tensor) -> Tensor:
    size = images.shape[2:]
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
