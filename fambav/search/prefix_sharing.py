"""Prefix-shared evaluation: many plans on the same images, each common prefix computed once.

Plans that remove the same tokens at the first layers go through these together, like the branches
of a tree: a plan that differs from another at the last layer takes one layer more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fambav.engine.runtime import Precision
from fambav.layers import Tokens
from fambav.models import Backbone
from fambav.reduction import Reduction


@torch.no_grad()
def prefix_shared_logits(
    net: Backbone,
    batches: Iterable[Tensor],
    reductions: Sequence[Reduction],
    precision: Precision,
) -> list[Tensor]:
    """Return a model's logits under each of several reductions.

    Args:
        net: In evaluation mode; its own reduction is restored.
        batches: Images, (batch, channels, height, width), on the model's device.
        reductions: At least one, in evaluation mode, for this model.
        precision: Format of the forward pass.

    Returns:
        For each reduction (images, classes), float32.
    """
    before, parts = net.reduction, list[list[Tensor]]()
    logits: dict[int, Tensor] = {}  # of a batch, by the index of the reduction

    def descend(tokens: Tokens, layer: int, group: Iterable[int]) -> None:
        """Run the layers from `layer` on, for reductions that act alike up to there."""
        if layer == net.depth:
            logits.update(dict.fromkeys(group, net.classify(tokens)))
            return
        branches: dict[Any, list[int]] = {}
        for index in group:
            branches.setdefault(_action(reductions[index], layer), []).append(index)
        for branch in branches.values():
            net.reduction = reductions[branch[0]]
            descend(net.layers[layer](tokens, net.hooks(layer, tokens)), layer + 1, branch)

    try:
        for images in batches:
            with precision.autocast():
                descend(net.embed(images), 0, range(len(reductions)))
            parts.append([logits[index].float() for index in range(len(reductions))])
    finally:
        net.reduction = before
    return [torch.cat(own) for own in zip(*parts, strict=True)]


def _action(reduction: Reduction, layer: int) -> Any:
    """Return all that a reduction does at a layer; equal actions are computed once."""
    hooks, count = reduction.hooks(layer), reduction.schedule.counts[layer]
    return count and reduction.name, count, hooks.asked, hooks.needs, hooks.gap
