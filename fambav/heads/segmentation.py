"""A backbone and a head that labels its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fambav.heads.library import LibraryHead
from fambav.heads.upernet import FCNHead, UPerHead
from fambav.layers import BackboneInfo
from fambav.models import Hierarchical, Model, TimmModel, adapt, official
from fambav.models.flops import Cost
from fambav.registry import FAMILIES, HEADS, LIBRARY_HEADS

MAPS = 4  # of a backbone that a head reads
_DECODER, _AUXILIARY = "decode_head", "auxiliary_head"
_OUTER = (f"{_DECODER}.", f"{_AUXILIARY}.")


class SegmentationModel(Model):
    """Logits of each pixel from the feature maps of a backbone, at the size of the images.

    Names of parameters are those of mmsegmentation: backbone., decode_head., auxiliary_head.

    Args:
        backbone: A classifier of ours, which is changed in place: all stages, or of a stack of
            equal layers the ends of its quarters, give a map.  Or of timm's `features_only`: maps
            images to a list of (batch, channels, height, width), the finest one first, which its
            `feature_info.channels()` describes.
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

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        head: str = "upernet",
        channels: int = 512,
        auxiliary: int | None = -2,
    ) -> None:
        super().__init__()
        self.backbone: Any
        self.backbone, self.indices, info = _features(backbone, read=2 if head == "fcn" else MAPS)
        widths = [each["num_chs"] for each in info]
        self.head, self.auxiliary = head, auxiliary
        self.decode_head: UPerHead | FCNHead | LibraryHead
        if head in LIBRARY_HEADS:
            name = self.backbone.pretrained_cfg["architecture"]
            strides = [each["reduction"] for each in info]
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
        own = {"num_classes": num_classes, "classifier": self.classifier_name}
        self.pretrained_cfg = {**self.backbone.pretrained_cfg, **own}
        # A backbone of others draws for its own batch only.
        self.draws_whole_update = getattr(self.backbone, "draws_whole_update", False)

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # the head's own
        """Logits of a pixel."""
        return self.decode_head.num_classes

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return int(self.pretrained_cfg["input_size"][0])

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of an image in training, in pixels."""
        _, height, width = self.pretrained_cfg["input_size"]
        return height, width

    @property
    def info(self) -> BackboneInfo:
        """The backbone in figures, if it is one of ours."""
        return cast(TimmModel, self.backbone).info

    @property
    def blocks(self) -> list[nn.Module]:
        """All layers of the backbone, in the order of depth, if it is one of ours."""
        return cast(TimmModel, self.backbone).blocks

    @property
    def reduction(self) -> Any:
        """What removes tokens of the backbone; None if nothing can.  Set it on the backbone."""
        return getattr(self.backbone, "reduction", None)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters of the backbone that weight decay would pull away."""
        listed: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in listed}

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of images, (batch, channels, height, width) each."""
        if self.indices is None:
            return list(self.backbone(images))
        maps: list[Tensor] = self.backbone.forward_intermediates(
            images, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        return maps

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

    def pick(
        self,
        payload: Mapping[str, Any],
        *,
        ema: bool = False,
        head: Literal["strict", "drop"] = "strict",
    ) -> dict[str, Tensor]:
        """Pick the weights out of what a file holds: of this model, or of its backbone alone.

        Args:
            payload: As for `official`.
            ema: Take the moving average.
            head: "drop" takes those of a classifier too, without its head.

        Returns:
            Weights under the names of this model, perhaps fewer or more than it has.

        Raises:
            ValueError: As `official`, or if there is no head of pixels and there has to be one.
        """
        weights = official(payload, ema=ema)
        if any(name.startswith(_OUTER) for name in weights):
            return weights
        if head != "drop":
            raise ValueError(
                f"checkpoint has no {_DECODER}, expected one of a segmentation; --finetune takes a"
                " backbone alone"
            )
        body = self.backbone.state_dict()
        if isinstance(self.backbone, TimmModel):
            weights = self.backbone.pick(payload, ema=ema, head="drop")
        # A classifier has no norms of single maps, and others behind the last layer.
        new = {name: value for name, value in body.items() if name.startswith("outnorm")}
        weights = new | {name: value for name, value in weights.items() if name in body}
        return {f"backbone.{name}": value for name, value in weights.items()}

    def remap(
        self,
        payload: Mapping[str, Any],
        *,
        ema: bool = False,
        class_token: str | None = None,
        grid: tuple[int, int] | None = None,
        head: Literal["strict", "drop"] = "strict",
    ) -> dict[str, Tensor]:
        """Pick the weights out of what a file holds and fit them, as `TimmModel.remap` does.

        With "drop", heads that are missing or of other classes are this model's.

        Raises:
            ValueError: As `pick`, or if names or shapes differ.
        """
        weights, own = self.pick(payload, ema=ema, head=head), self.state_dict()
        body = {n.removeprefix("backbone."): v for n, v in weights.items() if n[:9] == "backbone."}
        if isinstance(self.backbone, TimmModel):
            placed = "class_token" in FAMILIES[self.info.family].arguments
            place = class_token if placed else None
            body = adapt(body, self.backbone, class_token=place, grid=grid)
        outer = {name: value for name, value in weights.items() if name.startswith(_OUTER)}
        rows = len(outer.get(f"{self.classifier_name}.weight", ()))
        if head == "drop":
            fits = {n: v for n, v in outer.items() if n in own and v.shape == own[n].shape}
            outer = {n: v for n, v in own.items() if n.startswith(_OUTER)} | fits
        elif rows != self.num_classes:
            raise ValueError(f"checkpoint has {rows} classes, expected {self.num_classes}")
        return outer | {f"backbone.{name}": value for name, value in body.items()}


def _features(
    backbone: Any, *, read: int
) -> tuple[nn.Module, list[int] | None, list[dict[str, Any]]]:
    """Return what makes maps, which of its stages or layers do, and timm's facts on each map.

    A classifier of ours makes the last `read` maps and loses what they do not need.  Where a model
    of stages does not normalise its maps itself, each gets a norm.
    """
    if not isinstance(backbone, TimmModel):
        # timm's getter has no weights of its own, and would put "model." into all names
        indices = getattr(backbone, "out_indices", None)
        return getattr(backbone, "model", backbone), indices, backbone.feature_info.get_dicts()
    own = getattr(type(backbone), "feature_norm", None)
    if isinstance(backbone, Hierarchical) and own is Hierarchical.feature_norm:
        backbone.add_out_norms()
    depth = len(backbone.feature_info)
    quarters = sorted({max((n + 1) * depth // MAPS - 1, 0) for n in range(MAPS)})
    indices = backbone.prune_intermediate_layers(quarters[-read:], prune_norm=True)
    return backbone, indices, [backbone.feature_info[n] for n in indices]


def _at(images: Tensor, logits: Tensor) -> Tensor:
    size = images.shape[2:]
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
