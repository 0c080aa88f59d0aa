"""Many plans on the same images, computing what they share once.

Plans that remove the same tokens at the first layers go through these together, like the branches
of a tree: a plan that differs from another at the last layer costs one layer more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fambav.engine.precision import Precision
from fambav.layers import Tokens
from fambav.models import Backbone
from fambav.reduction import Reduction


@torch.no_grad()
def logits(
    net: Backbone,
    batches: Iterable[Tensor],
    reductions: Sequence[Reduction],
    precision: Precision,
) -> list[Tensor]:
    """Return what a model says of images under each of several reductions.

    Args:
        net: In evaluation mode; it keeps the reduction that it has.
        batches: Images, (batch, channels, height, width), on the model's device.
        reductions: At least one, in evaluation mode, for this model.
        precision: Format of the forward pass.

    Returns:
        For each reduction (images, classes), float32.
    """
    before, found = net.reduction, list[list[Tensor]]()
    try:
        for images in batches:
            with precision.autocast():
                leaves = _Walk(net, reductions)
                leaves.descend(net.embed(images), 0, range(len(reductions)))
            found.append([leaves.said[n].float() for n in range(len(reductions))])
    finally:
        net.reduction = before
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


class _Walk:
    """One batch on its way through a model under several reductions.

    Attributes:
        said: The logits of each reduction, by its number.
    """

    def __init__(self, net: Backbone, reductions: Sequence[Reduction]) -> None:
        self.net, self.reductions = net, reductions
        self.said: dict[int, Tensor] = {}

    def descend(self, tokens: Tokens, layer: int, group: Sequence[int]) -> None:
        """Send tokens through the layers from `layer` on, for reductions alike up to there."""
        if layer == self.net.depth:
            said = self.net.classify(tokens)
            self.said.update(dict.fromkeys(group, said))
            return
        parts: dict[Any, list[int]] = {}
        for number in group:
            parts.setdefault(self._doings(number, layer), []).append(number)
        for part in parts.values():
            self.net.reduction = self.reductions[part[0]]
            behind = self.net.layers[layer](tokens, self.net.hooks(layer, tokens))
            self.descend(behind, layer + 1, part)

    def _doings(self, number: int, layer: int) -> Any:
        """Return all that a reduction does at a layer: who does the same can share it."""
        reduction = self.reductions[number]
        hooks, count = reduction.hooks(layer), reduction.schedule.counts[layer]
        return count and reduction.name, count, hooks.asked, hooks.needs, hooks.gap
