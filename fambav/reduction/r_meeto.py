"""Merge similar tokens and keep their order: R-MeeTo's way, and what it was compared with.

Class tokens are taken out.  Every second patch points at the patch in between that is nearest to
it, by what the block before says of them, and the count nearest pairs become one token each.

Source: Shi et al., "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training",
arXiv:2412.12496, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fambav.layers import BackboneInfo, Tokens
from fambav.ops.match import Selection, in_order, others
from fambav.reduction.apply import interspersed
from fambav.reduction.reducer import Places, Reducer, at_least, chosen
from fambav.registry import REDUCERS

METRICS = ("hidden", "B", "C", "delta")
DISTANCES = ("cosine", "l1", "l2")
ORDERS = ("kept", "lost")
MERGES = ("mean", "prune")

_COUNTS = {192: 5, 384: 11, 768: 11}  # by width


@REDUCERS.register("r-meeto")
class RMeeTo(Reducer):
    """Merges as R-MeeTo does, at the input of a block.

    Args:
        metric: What is compared: "hidden", the output of the block before, or what its mixer made
            of it, the mean over directions of "B", "C" or the step sizes "delta".
        distance: Of features scaled to length 1: "cosine", "l1" or "l2".
        nearest: Which partner a patch points at, 1 for the nearest, 2 for the next to nearest.
        order: "kept", or "lost": the compared patches that are left come first, the one most like
            its partner ahead, then all others; a class token among p places goes to the same share
            of the compared ones.
        merge: "mean" of a pair, or "prune", which drops the compared patch.
        weighted: Whether a mean counts the patches behind each token.
    """

    hook = "before"

    def __init__(
        self,
        *,
        metric: str = "hidden",
        distance: str = "cosine",
        nearest: int = 1,
        order: str = "kept",
        merge: str = "mean",
        weighted: bool = True,
    ) -> None:
        super().__init__()
        self.metric = chosen("metric", metric, METRICS)
        self.distance = chosen("distance", distance, DISTANCES)
        self.nearest = at_least("nearest", nearest, 1)
        self.ordered = chosen("order", order, ORDERS) == "kept"
        self.pruned = chosen("merge", merge, MERGES) == "prune"
        self.weighted = weighted
        self.needs = frozenset() if metric == "hidden" else frozenset({metric})
        self.class_policy = "proportional" if self.ordered else "exact"

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Pair the `count` patches that are nearest to their partners."""
        features, class_places = self._features(tokens), tokens.class_places
        length = tokens.position.shape[1]
        if self.ordered and self._fast and not self.pruned:
            return in_order(features, count, class_places)
        source, target = self._ranked(features, class_places)
        left, source, target = source[:, count:], source[:, :count], target[:, :count]
        keep = others(source, length)
        if not self.ordered:
            keep = _score_first(left, source, class_places, length)
        drawn = 0 if self.pruned else count
        return Selection(keep, source[:, :drawn], target[:, :drawn])

    def limit(self, length: int, class_places: Places) -> int:
        """Return half of the patches, rounded up, if the others are enough to choose from."""
        patches = length - len(class_places)
        return patches - patches // 2 if patches // 2 >= self.nearest else 0

    @classmethod
    def published(cls, info: BackboneInfo) -> str | None:
        """Return the paper's schedule: every second layer of a Vim, in all but the first two."""
        if (info.family, info.depth, info.tokens) != ("vim", 24, 197) or info.width not in _COUNTS:
            return None
        return f"r:{_COUNTS[info.width]}@3-23/2"

    @property
    def _fast(self) -> bool:
        return self.distance == "cosine" and self.nearest == 1

    def _features(self, tokens: Tokens) -> Tensor:
        """Return what is compared, (batch, length, width)."""
        if self.metric == "hidden":
            return tokens.x
        told: Tensor = getattr(tokens.signals, self.metric)
        return told.mean(dim=1)

    def _ranked(self, features: Tensor, class_places: Tensor) -> tuple[Tensor, Tensor]:
        """Return every second patch and its partner, the nearest pair first."""
        patches = others(class_places, features.shape[1])
        half = patches.shape[1] // 2
        if self._fast:
            _, source, target, _ = in_order(features, patches.shape[1] - half, class_places)
            return source, target
        rows = features.detach().gather(1, patches[..., None].expand(-1, -1, features.shape[2]))
        score = _likeness(rows.float(), self.distance)
        ranking = score.sort(dim=2, descending=True, stable=True)
        best, partner = (found[..., self.nearest - 1] for found in ranking)
        first = best.sort(dim=1, descending=True, stable=True).indices
        source, target = 2 * first, 2 * partner.gather(1, first) + 1
        return patches.gather(1, source), patches.gather(1, target)


def _likeness(rows: Tensor, distance: str) -> Tensor:
    """Compare rows at even places with those at odd ones.

    Products are in float64 and distances without one, out of reach of what users allow float32's.

    Args:
        rows: (batch, patches, width), float32.
        distance: One of `DISTANCES`.

    Returns:
        The more, the more alike, (batch, even, odd), float32.
    """
    norm = rows.norm(dim=2, keepdim=True)
    rows = rows / norm.clamp_min(1e-12)
    even, odd = rows[:, 0::2], rows[:, 1::2]
    if distance == "cosine":
        return (even.double() @ odd.double().mT).float()
    power = 1.0 if distance == "l1" else 2.0
    return -torch.cdist(even, odd, p=power, compute_mode="donot_use_mm_for_euclid_dist")


def _score_first(left: Tensor, source: Tensor, class_places: Tensor, length: int) -> Tensor:
    """Order what is kept as R-MeeTo does where order is lost.

    Args:
        left: Compared patches that stay, the one most like its partner first, (batch, left).
        source: Compared patches that go, (batch, count).
        class_places: Where class tokens are, ascending, (batch, k).
        length: Tokens before.
    """
    compared = torch.cat((left, source, class_places), dim=1)
    patches = torch.cat((left, others(compared, length)), dim=1)
    share = class_places * left.shape[1] // (left.shape[1] + source.shape[1])
    rank = torch.arange(class_places.shape[1], device=left.device)
    new = (share - rank).cummax(dim=1).values + rank if len(rank) else share
    return interspersed(patches, class_places, new)
