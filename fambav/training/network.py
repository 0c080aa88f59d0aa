"""The model of a configuration, and its layout without weights."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from fambav.config import Config
from fambav.heads import MAPS, Detector, HeadedModel, SegmentationModel
from fambav.layers.embed import pair
from fambav.models import Backbone, TimmModel
from fambav.reduction import (
    Reduction,
    Schedule,
    StagedReduction,
    from_fusion,
    fused,
    read_options,
    reduce,
)
from fambav.registry import DETECTORS, FOREIGN, LIBRARY_HEADS, family_of, nearest
from fambav.tasks import task_of
from fambav.timm_compat import timm


class Layout(NamedTuple):
    """What a model without weights knows of itself.

    Attributes:
        input_size: Height and width of an image, in pixels; of a series lookback and 1.
        reduction: What removes tokens; None for a model that has none, and for one of stages whose
            cells all stay.
        net: The model itself, without values, of one class.
    """

    input_size: tuple[int, int]
    reduction: Reduction | StagedReduction | None
    net: nn.Module

    @property
    def schedule(self) -> Schedule | None:
        """Tokens at each layer; None for a model that has no reduction."""
        return None if self.reduction is None else self.reduction.schedule


def model(config: Config, *, num_classes: int) -> nn.Module:
    """Build the model of `config` with new weights, drawn from torch's global generator.

    Args:
        config: Names and shapes the model.
        num_classes: Length of the output.

    Raises:
        ValueError: If the model cannot be built so, or its tokens cannot be fused so.
    """
    if config.model.model.startswith(FOREIGN):
        return _foreign(config, num_classes)
    chosen, fusion = config.model, config.fusion
    known = family_of(chosen.model)
    own = _own_arguments(config)
    own[task_of(config.data.data_set).output] = num_classes if chosen.head is None else 0
    net: Any = timm.create_model(chosen.model, **own)
    if not known.layers:
        return cast(nn.Module, net)
    net.set_grad_checkpointing(chosen.grad_checkpointing)
    if isinstance(net, Backbone):
        net.reduction = fused(
            net.info,
            fusion.fusion_strategy,
            layer=fusion.fusion_layer,
            token=fusion.fusion_token,
            method=fusion.fusion_method,
            plan=fusion.fusion_plan,
        )
    if config.reduction.reduction != "none":
        reduce(net, **_reduction(config))
    return cast(nn.Module, net) if chosen.head is None else _headed(config, net, num_classes)


def _headed(config: Config, backbone: nn.Module, num_classes: int) -> HeadedModel:
    """Put a head that finds boxes, or one that labels pixels and its helper, on a backbone."""
    chosen = config.model
    if chosen.head in DETECTORS:
        return Detector(
            backbone,
            num_classes,
            head=chosen.head,
            channels=chosen.head_channels,
            anchor_scale=chosen.anchor_scale,
            region_samples=chosen.region_samples,
        )
    return SegmentationModel(
        backbone,
        num_classes,
        head=cast(str, chosen.head),
        channels=chosen.head_channels,
        auxiliary=-2 if chosen.auxiliary_weight else None,
    )


def _own_arguments(config: Config) -> dict[str, Any]:
    known = family_of(config.model.model)
    return {name: getattr(config.model, setting) for setting, name in known.arguments.items()}


def _reduction(config: Config) -> dict[str, Any]:
    """Return the arguments of `reduce`."""
    wanted = config.reduction
    return {
        "method": wanted.reduction,
        "schedule": wanted.reduction_schedule,
        "hook": wanted.reduction_hook,
        "scan": wanted.scan_policy,
        "gap_policy": wanted.gap_policy,
        "class_policy": wanted.class_token_policy,
        **read_options(wanted.reduction, wanted.reduction_options),
    }


def model_args(config: Config, net: TimmModel) -> dict[str, Any]:
    """Return what `timm.create_model` takes to build and reduce a model likewise, as plain data.

    Args:
        config: The model's.
        net: The model itself.
    """
    fusion, given = config.fusion, _own_arguments(config)
    if config.reduction.reduction != "none":
        given["reduction"] = _reduction(config)
    elif fusion.fusion_strategy != "none" or fusion.fusion_plan is not None:
        schedule = from_fusion(
            fusion.fusion_strategy,
            depth=net.info.depth,
            layer=fusion.fusion_layer,
            token=fusion.fusion_token,
            plan=fusion.fusion_plan,
        )
        given["reduction"] = {"method": fusion.fusion_method, "schedule": schedule}
    return {name: value for name, value in given.items() if value is not None}


def layout(config: Config) -> Layout:
    """Build the model of `config` on the meta device, without memory for its weights.

    Raises:
        ValueError: As `model`.
    """
    with torch.device("meta"):
        net = model(config, num_classes=1)
    if isinstance(net, TimmModel):
        own = getattr(net, "reduction", None)
        if isinstance(own, StagedReduction) and not own.reduces:
            own = None
        return Layout(net.img_size, own, net)
    known: Any = getattr(net, "pretrained_cfg", None) or {}
    size = config.model.input_size or tuple(known.get("input_size") or ())[-2:]
    if not size:
        hint = f"--model {config.model.model} does not say its own"
        raise ValueError(f"input_size is none, expected height and width in pixels; {hint}")
    return Layout(pair(size, name="input_size"), getattr(net, "reduction", None), net)


def reduction(config: Config) -> Reduction | StagedReduction:
    """Return what removes tokens from the model of `config`, and where, without its weights.

    Raises:
        ValueError: If the plan cannot be carried out, or the model's tokens cannot be reduced.
    """
    laid_out = layout(config)
    own = laid_out.reduction or getattr(laid_out.net, "reduction", None)
    if own is None:
        wanted = "one whose tokens can be reduced"
        raise ValueError(f"model is {config.model.model!r}, expected {wanted}")
    return cast("Reduction | StagedReduction", own)


def schedule(config: Config) -> Schedule:
    """Return how many tokens the model of `config` has at each layer, without its weights.

    Raises:
        ValueError: As `reduction`.
    """
    return reduction(config).schedule


def _foreign(config: Config, num_classes: int) -> nn.Module:
    """Build one of timm's own models."""
    name, chosen = config.model.model.removeprefix(FOREIGN), config.model
    if not timm.is_model(name):
        known = nearest(name, timm.list_models())
        hint = known if known.startswith("did") else "see timm.list_models()"
        raise ValueError(f"model is {chosen.model!r}, expected a model of timm's; {hint}")
    published = timm.models.get_pretrained_cfg(name)
    fixed = published is not None and published.fixed_input_size
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "img_size": chosen.input_size if fixed else None,
        "drop_rate": chosen.drop or None,
        "drop_path_rate": chosen.drop_path or None,
    }
    if chosen.head is not None:
        arguments = {n: v for n, v in arguments.items() if n in ("img_size", "drop_path_rate")}
        arguments |= {"features_only": True}  # the package's decoders read all maps there are
        arguments |= {} if chosen.head in LIBRARY_HEADS else {"out_indices": MAPS}
    try:
        net: nn.Module = timm.create_model(name, **arguments)
    except (TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model is {chosen.model!r}, which cannot be built so: {reason}"
        ) from error
    return net if chosen.head is None else _headed(config, net, num_classes)
