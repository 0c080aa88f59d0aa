"""A backbone and torchvision's detector on it: Faster R-CNN, and Mask R-CNN.

maps -> feature pyramid -> proposals of the RPN -> boxes and classes -> masks
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fambav.heads.headed import MAPS, HeadedModel
from fambav.heads.regions import fill_in_operators
from fambav.registry import DETECTORS
from fambav.timm_compat import torchvision

fill_in_operators()
_OPS, _PARTS = torchvision.ops, torchvision.models.detection
_RATIOS = (0.5, 1.0, 2.0)  # of an anchor's height and width
_BOX_CELLS, _MASK_CELLS = 7, 14  # that a region is pooled to

Targets = Sequence[Mapping[str, Tensor]]


class Anchors(_PARTS.anchor_utils.AnchorGenerator):  # type: ignore[misc, name-defined]  # of no stated type
    """Anchors in the cells of maps of given strides.

    torchvision divides the sides of images by those of maps, and is wrong where the last cells of a
    map reach out of the image.

    Args:
        sides: Of the anchors of each map, in pixels.
        strides: From one cell of each map to the next, in pixels.
    """

    def __init__(self, sides: Sequence[tuple[float, ...]], *, strides: Sequence[int]) -> None:
        super().__init__(sides, (_RATIOS,) * len(sides))
        self.strides = strides

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> Any:
        """Return the anchors of maps, (cells * ratios, 4) each; strides are those of the images."""
        del strides
        return super().grid_anchors(grid_sizes, [(stride, stride) for stride in self.strides])


class Detector(HeadedModel):
    """Boxes, their classes and, with "mask-rcnn", their masks, from the maps of a backbone.

    Names of parameters are those of torchvision: fpn., rpn., roi_heads., whose class 0 is the
    background.  Backbone and pyramid may run in 16 bits; what comes behind them is in float32.

    Args:
        backbone: As for `HeadedModel`.
        num_classes: Classes of boxes.
        head: "faster-rcnn" or "mask-rcnn".
        channels: Of all maps of the pyramid; a quarter of the width of the head of boxes.
        anchor_scale: Side of an anchor in cells of its map.
        region_samples: Regions of an image that the head of boxes learns from in an update, of up
            to four times as many proposals, at most 2,000; in evaluation there are half of these.

    Raises:
        ValueError: If there is no such head.

    Source: Ren et al., "Faster R-CNN", arXiv:1506.01497; Lin et al., "Feature pyramid networks",
    arXiv:1612.03144; He et al., "Mask R-CNN", arXiv:1703.06870; thresholds and numbers of
    proposals are those of torchvision's `fasterrcnn_resnet50_fpn`.
    """

    classifier_name = "roi_heads.box_predictor.cls_score"
    outer = ("roi_heads.", "rpn.", "fpn.")
    head_task = "detection"
    background = 1

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        head: str = "faster-rcnn",
        channels: int = 256,
        anchor_scale: float = 8.0,
        region_samples: int = 512,
    ) -> None:
        super().__init__(backbone, num_classes)
        if head not in DETECTORS:
            raise ValueError(f"head is {head!r}, expected one of {', '.join(DETECTORS)}")
        self.head = head
        widths = [each["num_chs"] for each in self.map_info]
        pooled = _OPS.feature_pyramid_network.LastLevelMaxPool()
        self.fpn = _OPS.FeaturePyramidNetwork(widths, channels, pooled)
        self.strides = [int(each["reduction"]) for each in self.map_info]
        # Maps of a stack of equal layers have one stride; their anchors differ all the same.
        finest = anchor_scale * self.strides[0]
        sides = tuple((finest * 2**level,) for level in range(len(widths) + 1))
        anchors = Anchors(sides, strides=(*self.strides, 2 * self.strides[-1]))
        proposed = {
            "training": min(2000, 4 * region_samples),
            "testing": min(1000, 2 * region_samples),
        }
        self.rpn = _PARTS.rpn.RegionProposalNetwork(
            anchors,
            _PARTS.rpn.RPNHead(channels, len(_RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=proposed,
            post_nms_top_n=proposed,
            nms_thresh=0.7,
        )
        self.roi_heads = _PARTS.roi_heads.RoIHeads(
            self._pool(_BOX_CELLS),
            _PARTS.faster_rcnn.TwoMLPHead(channels * _BOX_CELLS**2, 4 * channels),
            _PARTS.faster_rcnn.FastRCNNPredictor(4 * channels, num_classes + self.background),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=region_samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            **(self._mask_parts(channels, num_classes) if head == "mask-rcnn" else {}),
        )

    def _pool(self, cells: int) -> Any:
        """Return what pools regions from the map whose cells suit their size."""
        names = list(map(str, range(len(self.strides))))
        pool = _OPS.MultiScaleRoIAlign(names, cells, sampling_ratio=2)
        # It would guess powers of 2 from the first images, wrong ones if those are small.
        pool.scales = [1 / stride for stride in self.strides]
        levels = (int(math.log2(self.strides[n])) for n in (0, -1))
        pool.map_levels = _OPS.poolers.initLevelMapper(*levels)
        return pool

    def _mask_parts(self, channels: int, num_classes: int) -> dict[str, Any]:
        parts = _PARTS.mask_rcnn
        return {
            "mask_roi_pool": self._pool(_MASK_CELLS),
            "mask_head": parts.MaskRCNNHeads(channels, (channels,) * MAPS, dilation=1),
            "mask_predictor": parts.MaskRCNNPredictor(
                channels, channels, num_classes + self.background
            ),
        }

    def forward(self, images: Tensor, targets: Targets | None = None) -> Any:
        """Find boxes, or learn from those that are known.

        Args:
            images: (batch, channels, height, width).
            targets: For each image `boxes`, (n, 4), float32: left, top, right, bottom in pixels;
                `labels`, (n,), int64, from 0; `crowd`, (n,), bool, of boxes around many, which
                teach nothing; of "mask-rcnn" also `masks`, (n, height, width), uint8.

        Returns:
            With targets, losses by name, scalars.  Else for each image `boxes` and `labels` as
            above, of at most 100, `scores`, (n,), from the best to the worst, `finite`, a scalar
            that is 0, or NaN where a map is not finite, and of "mask-rcnn" `masks`, (n, height,
            width), bool.
        """
        maps = dict(enumerate(self.maps(images)))
        pyramid = self.fpn({str(level): x for level, x in maps.items()})
        sizes = [(images.shape[2], images.shape[3])] * len(images)
        listed = _PARTS.image_list.ImageList(images, sizes)
        known = None if targets is None else [self._teaching(each) for each in targets]
        for part in (self.rpn, self.roi_heads):  # whose mode says whether they return losses
            part.train(known is not None)
        with torch.autocast(images.device.type, enabled=False):
            pyramid = {name: x.float() for name, x in pyramid.items()}
            proposals, losses = self.rpn(listed, pyramid, known)
            outputs, others = self.roi_heads(pyramid, proposals, sizes, known)
            if known is not None:
                return {**losses, **others}
            finite = sum(0 * x.flatten(1).sum(dim=1) for x in pyramid.values())
            return [
                self._answer(own, zero, size)
                for own, zero, size in zip(outputs, finite, sizes, strict=True)
            ]

    def _teaching(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what torchvision reads of a target."""
        single = ~target["crowd"]
        known = {name: target[name][single] for name in ("boxes", "labels")}
        known["labels"] = known["labels"] + self.background
        if self.head == "mask-rcnn":
            known["masks"] = target["masks"][single]
        return known

    def _answer(
        self, output: dict[str, Tensor], zero: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        output = {**output, "labels": output["labels"] - self.background, "finite": zero}
        if self.head == "mask-rcnn":
            shares = _PARTS.roi_heads.paste_masks_in_image(output["masks"], output["boxes"], size)
            output["masks"] = shares[:, 0] >= 0.5
        return output
