"""The model that a configuration asks for, and what is known of it before it is built."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fambav.config import Config
from fambav.ecosystem import timm
from fambav.models import Vim
from fambav.reduction import Schedule
from fambav.registry import nearest

_FOREIGN = "timm/"


class Sketch(NamedTuple):
    """A model without weights.

    Attributes:
        input_size: Height and width of an image, in pixels.
        schedule: Tokens at each layer; None for a model that keeps its own.
    """

    input_size: tuple[int, int]
    schedule: Schedule | None


def model(config: Config, *, num_classes: int) -> nn.Module:
    """Build the model of `config` with new weights, drawn from torch's global generator.

    Args:
        config: Names and shapes the model.
        num_classes: Length of the output.

    Raises:
        ValueError: If the model cannot be built so, or its tokens cannot be fused so.
    """
    if config.model.model.startswith(_FOREIGN):
        return _foreign(config, num_classes)
    chosen, fusion = config.model, config.fusion
    net: nn.Module = timm.create_model(
        chosen.model,
        num_classes=num_classes,
        img_size=chosen.input_size,
        patch_size=chosen.patch_size,
        stride=chosen.stride,
        drop_rate=chosen.drop,
        drop_path_rate=chosen.drop_path,
        class_token=chosen.class_token,
        bimamba_type=chosen.bimamba_type,
        legacy_init=chosen.legacy_init,
        fusion_strategy=fusion.fusion_strategy,
        fusion_layer=fusion.fusion_layer,
        fusion_token=fusion.fusion_token,
        fusion_method=fusion.fusion_method,
        fusion_plan=fusion.fusion_plan,
    )
    if isinstance(net, Vim):
        net.set_grad_checkpointing(chosen.grad_checkpointing)
    return net


def sketch(config: Config) -> Sketch:
    """Lay out the model of `config` without memory for its weights.

    Raises:
        ValueError: As `model`.
    """
    with torch.device("meta"):
        net = model(config, num_classes=1)
    if isinstance(net, Vim):
        return Sketch(net.img_size, net.schedule)
    height, width = net.pretrained_cfg["input_size"][-2:]  # type: ignore[index]  # timm sets it
    size = config.model.input_size
    return Sketch((size, size) if size else (int(height), int(width)), None)


def schedule(config: Config) -> Schedule:
    """Return how many tokens the model of `config` has at each layer, without building it.

    Raises:
        ValueError: If the plan cannot be carried out, or the model has no tokens to fuse.
    """
    found = sketch(config).schedule
    if found is None:
        raise ValueError(f"model is {config.model.model!r}, expected one whose tokens can be fused")
    return found


def _foreign(config: Config, num_classes: int) -> nn.Module:
    """Build one of timm's own models."""
    name, chosen = config.model.model.removeprefix(_FOREIGN), config.model
    if not timm.is_model(name):
        known = nearest(name, timm.list_models())
        hint = known if known.startswith("did") else "see timm.list_models()"
        raise ValueError(f"model is {chosen.model!r}, expected a model of timm's; {hint}")
    found = timm.models.get_pretrained_cfg(name)
    fixed = found is not None and found.fixed_input_size
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "img_size": chosen.input_size if fixed else None,
        "drop_rate": chosen.drop or None,
        "drop_path_rate": chosen.drop_path or None,
    }
    try:
        net: nn.Module = timm.create_model(name, **arguments)
    except TypeError as error:
        raise ValueError(f"model is {chosen.model!r}, which cannot be built so: {error}") from error
    return net
