"""Which parts a model has, and what they cost at the lengths of its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from fambav import training
from fambav.config import Config
from fambav.costs.reduction import OVERHEADS, Overhead, aligned, handed_over
from fambav.costs.report import Report, Row
from fambav.layers import BackboneInfo
from fambav.models import Backbone
from fambav.models.flops import FREE, Cost, Parts, total
from fambav.reduction import Reducer, Reduction

Grid = tuple[int, int]

# What `--data-set` means without reading it; FOLDER and INAT have what their files say.
CLASSES = {
    "DIGITS": 10,
    "SHAPES100": 100,
    "CIFAR": 100,
    "CIFAR10": 10,
    "IMNET": 1000,
    "FAKE": 1000,
}


def configured(config: Config) -> Report:
    """Count what an image costs the model of a configuration, without reading its data.

    Args:
        config: The settings; without `num_classes` the head has the classes of the data set.

    Returns:
        The cost of each part.

    Raises:
        ValueError: If the model is not one of ours, cannot be built, or the number of classes is
            known only to the data's files.
    """
    name, classes = config.model.model, config.model.num_classes
    if name.startswith("timm/"):
        raise ValueError(f"model is {name!r}, expected one of `fambav list models`")
    if classes is None:
        classes = CLASSES.get(config.data.data_set)
    if classes is None:
        raise ValueError(
            f"num_classes is None, expected a number with data_set {config.data.data_set}, whose"
            " classes only its files tell"
        )
    with torch.device("meta"):
        net = training.model(config, num_classes=classes)
    return count(net)


def count(model: nn.Module) -> Report:
    """Count what an image costs a model at the lengths of its schedule.

    Args:
        model: One of ours; weights may be on the meta device.

    Returns:
        The cost of each part.

    Raises:
        ValueError: If the model is not one of ours.
    """
    if not isinstance(model, Backbone):
        raise ValueError(f"model is a {type(model).__name__}, expected one of `fambav list models`")
    parts, info, reduction = model.flop_parts(), model.info, model.reduction
    method = reduction.method if reduction.schedule.removed else None
    dense = (mixer.cost(info.tokens, math.prod(info.grid)) for mixer in parts.mixers)
    layers = _unreduced(parts, info) if method is None else _reduced(parts, reduction, method)
    return Report(
        model=model.pretrained_cfg.get("architecture", type(model).__name__),
        input_size=model.img_size,
        num_classes=model.num_classes,
        method=None if method is None else method.name,
        scan=None if method is None else reduction.scan,
        counted=method is None or method.name in OVERHEADS.names(),
        start=info.tokens,
        rows=(
            Row(part="patches", tokens=math.prod(info.grid), own=parts.patches),
            *layers,
            Row(part="head", tokens=1, own=parts.head),
        ),
        dense=total(parts.patches, *dense, parts.head),
    )


def _unreduced(parts: Parts, info: BackboneInfo) -> Iterator[Row]:
    """Lay out layers that all see all tokens."""
    for layer, mixer in enumerate(parts.mixers, start=1):
        own = mixer.cost(info.tokens, math.prod(info.grid))
        yield Row(part="layer", layer=layer, tokens=info.tokens, own=own)


def _reduced(parts: Parts, reduction: Reduction, method: Reducer) -> Iterator[Row]:
    """Follow tokens, and the grid they form as long as they form one, through the layers.

    Convolutions of tokens that form no grid run on the grid of the start, among zeros.
    """
    schedule, masked, gap = reduction.schedule, reduction.scan == "masked", reduction.gap_policy
    info = reduction.info
    left, grid = info.tokens, cast("Grid | None", info.grid)
    for layer, (mixer, gone) in enumerate(zip(parts.mixers, schedule.counts, strict=True)):
        sizes = Overhead(left, gone, info.width, parts.inner, info.directions, parts.printed)
        behind = method.grid_after(grid, gone) if gone and not masked else grid
        seen = info.tokens if masked else schedule.lengths[layer]
        cells = math.prod((grid if schedule.after else behind) or info.grid)
        yield Row(
            part="layer",
            layer=layer + 1,
            tokens=seen,
            removed=gone,
            own=mixer.cost(seen, cells),
            alignment=aligned(seen, sizes, gap) if seen < info.tokens else FREE,
            reduction=_overhead(method.name, sizes, gap) if gone else FREE,
        )
        left, grid = left - gone, behind


def _overhead(method: str, sizes: Overhead, gap: str) -> Cost:
    """Return what one reduction costs by itself, as far as that is known."""
    own = OVERHEADS[method](sizes) if method in OVERHEADS.names() else FREE
    return total(own, handed_over(sizes, gap))
