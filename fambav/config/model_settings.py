"""Settings of the model and of what removes its tokens: the first groups of `schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fambav import registry
from fambav.config import checks, when
from fambav.config.setting import (
    COUNT,
    LARGEST,
    NATURAL,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    RATE,
    Affects,
    Bounds,
    Group,
    option,
    switch,
)


@dataclass(frozen=True, kw_only=True)
class Model(Group):
    """Model."""

    affects: ClassVar[Affects] = "model"
    example: ClassVar[str] = "--model vim_tiny --input-size 192 --class-token head"

    model: str = option(
        "vim_tiny", "model of `fambav list models`, or timm/NAME", check=checks.model_name
    )
    input_size: int | tuple[int, int] | None = option(
        None,
        "height and width of an image in pixels, one number for both; none = the model's own",
        when.IMAGES,
        bounds=PIXELS,
    )
    patch_size: int | None = option(
        None,
        "height and width of a patch in pixels; none = the model's own",
        when.VIM,
        bounds=PIXELS,
    )
    stride: int | None = option(
        None, "pixels between patches; none = the model's own", when.VIM, bounds=PIXELS
    )
    num_classes: int | None = option(
        None, "length of the output; none = the data set's", when.IMAGES, bounds=COUNT
    )
    class_token: str = option(
        "middle", "place of the class token", when.CLASS_TOKEN, choices=registry.CLASS_TOKENS
    )
    bimamba_type: str = option("v2", "directions of the mixer", when.VIM, choices=registry.BIMAMBA)
    legacy_init: bool = switch(
        "zero as the backward scan's initial dt bias, as published", when.VIM
    )
    param_order: str = option(
        "raster",
        "PlainMamba: step sizes go with the place in the image, as in released weights, or with "
        "their token, as the paper describes",
        when.PLAINMAMBA,
        choices=registry.PARAM_ORDERS,
    )
    dt_bias_twice: bool = switch(
        "PlainMamba: add the step sizes' bias twice, as released weights need",
        when.PLAINMAMBA,
        on=True,
        off_value=False,
    )
    distillation_head: bool = switch(
        "GroupMamba: a second head, which learns from a teacher; the output is their mean",
        when.TWO_HEADS,
        when.CLASSES,
        on=True,
        off_value=False,
    )
    drop: float = option(
        0.0,
        "dropout after the position embedding, before the head, or of tsm2's mixers too",
        when.DROPOUT,
        when.DROPPED,
        bounds=RATE,
    )
    drop_path: float = option(
        0.1,
        "stochastic depth: largest probability of dropping a block",
        when.DROP_PATH,
        otherwise=0.0,
        bounds=RATE,
    )
    head: str | None = option(
        None,
        "what labels pixels, or finds boxes, on the maps of a backbone; none = upernet, or "
        "faster-rcnn; of the others, all but fcn and mask-rcnn need segmentation-models-pytorch",
        when.HEADED,
        choices=registry.HEADS + registry.DETECTORS,
    )
    head_channels: int = option(
        512,
        "width of the maps inside --head upernet or fcn; of faster-rcnn and mask-rcnn, 256 by "
        "default",
        when.HEADED,
        when.WIDE_HEAD,
        bounds=Bounds(2, LARGEST),
    )
    auxiliary_weight: float = option(
        0.4,
        "weight of the loss of a second head, which labels pixels on the last map but one while "
        "training; 0 = no such head",
        when.HEADED,
        when.MASKS,
        bounds=NOT_NEGATIVE,
    )
    anchor_scale: float = option(
        8.0,
        "side of an anchor box, in cells of the map that it is of",
        when.BOXES,
        bounds=POSITIVE,
    )
    region_samples: int = option(
        512,
        "regions of an image that the head of boxes learns from in an update; four times as many "
        "are proposed, 2,000 at most",
        when.BOXES,
        bounds=COUNT,
    )
    lookback: int = option(
        512, "rows of a series that a forecast is made from", when.SERIES, bounds=COUNT
    )
    horizon: int = option(96, "rows of a series that are forecast", when.SERIES, bounds=COUNT)
    grad_checkpointing: bool = switch(
        "gradient checkpointing: recompute blocks in the backward pass to save memory",
        when.OURS,
        affects="speed",
    )
    scan_backend: str | None = option(
        None,
        "force one implementation of the scan; none = the fastest",
        when.SCANNING,
        affects="speed",
        choices=registry.SCAN_BACKENDS,
    )
    compile: bool = switch("compile the model with torch.compile", when.ONE_SHAPE, affects="speed")
    cuda_graphs: bool = switch(
        "launch forward and backward passes as CUDA graphs",
        when.OURS,
        when.ONE_SHAPE,
        when.NOT_COMPILED,
        affects="speed",
    )


@dataclass(frozen=True, kw_only=True)
class Reduction(Group):
    """Token reduction by any method."""

    affects: ClassVar[Affects] = "model"
    example: ClassVar[str] = "--reduction r-meeto --reduction-schedule r:5@3-23/2"

    reduction: str = option(
        "none",
        "how tokens are chosen",
        when.REDUCIBLE,
        choices=("none", *registry.METHODS),
        registry=registry.REDUCERS,
    )
    reduction_schedule: str = option(
        "published",
        "where and how many: r:5@3-23/2, ramp:16,-1, list:7,7,0, keep:0.8@5,10, "
        "tokens:157,125@10,20, or published, the one of the method's paper for the model",
        when.REDUCED,
        check=checks.schedule_form,
    )
    reduction_hook: str | None = option(
        None,
        "where in a layer tokens are removed; none = the method's own",
        when.REDUCED,
        choices=registry.HOOKS,
    )
    scan_policy: str | None = option(
        None,
        "how the scan treats removed tokens; none = the method's own",
        when.REDUCED,
        choices=registry.SCAN_POLICIES,
    )
    gap_policy: str | None = option(
        None,
        "how an aligned scan decays its state over removed tokens; the method's own if not given",
        when.REDUCED,
        choices=registry.GAP_POLICIES,
    )
    class_token_policy: str | None = option(
        None,
        "place of the class token among the kept tokens; none = the method's own",
        when.REDUCED,
        choices=registry.CLASS_TOKEN_POLICIES,
    )
    reduction_options: str = option(
        "",
        "options of the method, key=value,key=value; `fambav list options` names them",
        when.REDUCED,
    )


@dataclass(frozen=True, kw_only=True)
class Fusion(Group):
    """Token fusion with Famba-V's flags."""

    affects: ClassVar[Affects] = "model"
    example: ClassVar[str] = "--fusion-strategy upper --fusion-layer 6 --fusion-token 9"

    fusion_strategy: str = option(
        "none",
        "layers that fuse tokens",
        choices=registry.STRATEGIES,
        aliases=registry.STRATEGY_ALIASES,
    )
    fusion_layer: int | None = option(
        None,
        "first fused layer of upper, last of lower, counted from 1; none = 11 where one is needed",
        when.FUSED,
        when.UNPLANNED,
        when.ONE_ENDED,
        bounds=COUNT,
    )
    fusion_token: int = option(
        0,
        "tokens removed in each fused layer; 7 once a strategy is chosen",
        when.FUSED,
        when.UNPLANNED,
        bounds=NATURAL,
    )
    fusion_method: str = option(
        "famba-v",
        "how tokens are paired and merged; ordered keeps the scan order, famba-v is the paper's",
        when.FUSED,
        choices=registry.FUSION_METHODS,
    )
    fusion_plan: str | None = option(
        None, "layer:tokens pairs instead of a strategy, e.g. 6:9,8:9", check=checks.fusion_list
    )
