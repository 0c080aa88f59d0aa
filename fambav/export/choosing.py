"""The matching of tokens in plain operations that change nothing in place, as other runtimes need.

The same choice as `fambav.ops.match`, ties included: the lower place wins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def match(
    x: Tensor, class_places: Tensor, count: int, *, in_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose pairs as the operator `fambav::match` does.

    Args:
        x: Features to compare, (batch, length, dim); length is a fixed number.
        class_places: Tokens that stay alone, (batch, k), int64.
        count: Pairs to make.
        in_order: Whether class tokens are taken out before the split and order is kept.

    Returns:
        What is kept, the sources and their targets, as in a `Selection`.
    """
    batch, length, _ = x.shape
    if in_order:
        patches = others(class_places, length)
        features = x.gather(1, patches[..., None].expand(-1, -1, x.shape[2]))
        source, target = (patches.gather(1, places) for places in _pairs(features, count, None))
        return others(source, length), source, target
    taken = None
    if class_places.shape[1]:
        taken = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
        taken = taken.scatter(1, class_places, value=True)
    source, target = _pairs(x, count, taken)
    even = 2 * others(source // 2, length - length // 2)
    odd = torch.arange(1, length, 2, device=x.device).expand(batch, -1)
    return torch.cat((even, odd), dim=1), source, target


def others(places: Tensor, length: int) -> Tensor:
    """Return the places of 0 .. length-1 that are not among `places`, (batch, k), ascending."""
    batch, k = places.shape
    gone = torch.zeros(batch, length, dtype=torch.int64, device=places.device)
    gone = gone.scatter(1, places, value=length)  # behind all that are left
    numbers = gone + torch.arange(length, device=places.device)
    return numbers.sort(dim=1).values[:, : length - k]


def largest_first(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """Sort by the operation that ONNX has for it, in which the lower place always comes first."""
    del stable
    values, places = torch.topk(x, x.shape[dim], dim, descending)
    return values, places


def rank_in(ordered: Tensor, x: Tensor, **options: Any) -> Tensor:
    """Do what `torch.searchsorted` does, by counting."""
    if not ordered.shape[-1]:  # a sum over nothing, of which ONNX Runtime makes nothing
        return torch.zeros_like(x)
    right = options.get("right") or options.get("side") == "right"
    rows, each = ordered.unsqueeze(-2), x.unsqueeze(-1)
    return (rows <= each if right else rows < each).sum(dim=-1)


def _pairs(x: Tensor, count: int, taken: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = 1 / x.square().sum(dim=-1).sqrt().clamp_min(1e-12)
    score = (x[:, 0::2] @ x[:, 1::2].mT) * scale[:, 0::2, None] * scale[:, None, 1::2]
    if taken is not None:
        score = torch.where(taken[:, 0::2, None] | taken[:, None, 1::2], -torch.inf, score)
    best, partner = score.max(dim=-1)
    source = best.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return 2 * source, 2 * partner.gather(1, source) + 1
