"""A backbone that gives feature maps, and what every head on them has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from fambav.layers import BackboneInfo
from fambav.models import Hierarchical, Model, TimmModel, adapt, official
from fambav.registry import FAMILIES

MAPS = 4  # of a backbone that a head reads


class HeadedModel(Model):
    """A backbone, under that name, whose feature maps a head reads.

    Args:
        backbone: A classifier of ours, which is changed in place: all stages, or of a stack of
            equal layers the ends of its quarters, give a map.  Or of timm's `features_only`: maps
            images to a list of (batch, channels, height, width), the finest one first, which its
            `feature_info.channels()` describes.
        num_classes: That the head knows.
        read: How many maps the head reads, of the last ones.

    Attributes:
        outer: What names of the head's parameters begin with.
        head_task: What the head does.
        background: Rows of the classifier beside those of the classes.
        map_info: timm's facts on each map.
    """

    outer: ClassVar[tuple[str, ...]]
    head_task: ClassVar[str]
    background: ClassVar[int] = 0

    def __init__(self, backbone: Any, num_classes: int, *, read: int = MAPS) -> None:
        super().__init__()
        self.backbone: Any
        self.backbone, self.indices, self.map_info = _features(backbone, read=read)
        own = {"num_classes": num_classes, "classifier": self.classifier_name}
        self.pretrained_cfg = {**self.backbone.pretrained_cfg, **own}
        # A backbone of others draws for its own batch only.
        self.draws_whole_update = getattr(self.backbone, "draws_whole_update", False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a reduction is the backbone's."""
        if name == "reduction":  # `nn.Module` would keep it beside the property, without effect
            self.backbone.reduction = value
        else:
            super().__setattr__(name, value)

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # the head's own
        """Classes that the head knows."""
        return len(cast(Any, self.get_classifier()).weight) - self.background

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
        """What removes tokens of the backbone, where it is set too; None if nothing can."""
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
            ValueError: As `official`, or if there is no head and there has to be one.
        """
        weights = official(payload, ema=ema)
        if any(name.startswith(self.outer) for name in weights):
            return weights
        if head != "drop":
            raise ValueError(
                f"checkpoint has no {self.outer[0][:-1]}, expected one of a"
                f" {self.head_task}; --finetune takes a backbone alone"
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
        outer = {name: value for name, value in weights.items() if name.startswith(self.outer)}
        rows = len(outer.get(f"{self.classifier_name}.weight", ())) - self.background
        if head == "drop":
            fits = {n: v for n, v in outer.items() if n in own and v.shape == own[n].shape}
            outer = {n: v for n, v in own.items() if n.startswith(self.outer)} | fits
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
