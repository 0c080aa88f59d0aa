"""Merge tokens that are alike: into others anywhere in the sequence, or into their neighbours.

`FambaV`, `ToMe`, `Ordered` and `RMeeTo` compare tokens at even places with those at odd places.
Each even one points at the odd one most like it, and the count most similar pairs become one token
each, at the odd token's place; several even tokens may join the same odd one.  `SequentialMerging`
does so with neighbours alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.layers import BackboneInfo, Tokens
from fambav.ops.cross_scan import select_rows
from fambav.ops.match import Selection, evens_then_odds, in_order, others
from fambav.reduction.apply import interspersed
from fambav.reduction.reducer import Indices, Reducer, at_least, one_of, switch
from fambav.registry import REDUCERS

METRICS = ("hidden", "B", "C", "delta")
DISTANCES = ("cosine", "l1", "l2")
ORDERS = ("kept", "lost")
MERGES = ("mean", "prune")
NEIGHBOURS = ("both", "next")

_COUNTS = {192: 5, 384: 11, 768: 11}  # of R-MeeTo's published schedules, by width


@REDUCERS.register("famba-v")
class FambaV(Reducer):
    """The paper's fusion: plain means, even survivors first and then the odd places.

    A group's mean counts each of its tokens once, whatever its size.  Class tokens stay in the
    sequence and their scores are masked, so that they neither move into others nor take any in.

    Source: Shen et al., "Famba-V", arXiv:2409.09808, section 3; the matching is the balanced
    bipartite one of Bolya et al., "Token Merging", arXiv:2210.09461, section 3.
    """

    ordered = weighted = False

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Pair the `count` most similar tokens; scan order is lost."""
        return evens_then_odds(tokens.x, count, tokens.cls_index)

    @staticmethod
    def limit(length: int, cls_index: Indices) -> int:
        """Return the even places without a class token, if any odd place has none."""
        odd = sum(index % 2 for index in cls_index)
        even = len(cls_index) - odd
        return length - length // 2 - even if length // 2 > odd else 0

    @staticmethod
    def cls_index_after(length: int, cls_index: Indices, count: int) -> set[Indices]:
        """Return every arrangement of the class tokens that some features lead to.

        One at an odd place goes where all odd places go.  One at an even place is followed by the
        even places behind it, and ends up as many places forward as tokens went before it.
        """
        survivors = length - length // 2 - count
        halves = sorted(index // 2 for index in cls_index if index % 2 == 0)
        out = set()
        for ahead in _gone_before(halves, survivors + count, count):
            before = dict(zip(halves, ahead, strict=True))
            new = (p // 2 + (survivors if p % 2 else -before[p // 2]) for p in cls_index)
            out.add(tuple(new))
        return out


@REDUCERS.register("ordered")
class Ordered(Reducer):
    """Fusion for a scan: order is kept, and a mean counts the patches behind each token.

    Class tokens are taken out before the places are split into even and odd, and put back at
    their rank among the kept patches.  The order-keeping form is ours; on models that were trained
    with every token it has been more accurate than `famba-v` at every operating point measured, at
    equal cost (benchmarks/README.md).
    """

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Pair the `count` most similar patches; positions stay ascending."""
        return in_order(tokens.x, count, tokens.cls_index)

    @staticmethod
    def limit(length: int, cls_index: Indices) -> int:
        """Return half of the patches, rounded up, if there are two or more."""
        patches = length - len(cls_index)
        return patches - patches // 2 if patches > 1 else 0


@REDUCERS.register("tome")
class ToMe(FambaV):
    """Token merging as transformers know it: means count patches, and the scan order is lost.

    Tokens are compared as the block before left them, ahead of the sum of both streams.

    Source: Bolya et al., "Token Merging", arXiv:2210.09461, section 3; there the keys of an
    attention are compared, which a scan does not have.
    """

    hook = "before"
    weighted = True


@REDUCERS.register("r-meeto")
class RMeeTo(Reducer):
    """Merges as R-MeeTo does, at the input of a block; what it was compared with are options.

    Args:
        metric: What is compared: "hidden", the output of the block before, or an intermediate of
            its mixer, the mean over directions of "B", "C" or the step sizes "delta".
        distance: Of features scaled to length 1: "cosine", "l1" or "l2".
        nearest: Which partner a patch points at, 1 for the nearest, 2 for the next to nearest.
        order: "kept", or "lost": the compared patches that are kept come first, the one most like
            its partner ahead, then all others; a class token at p of the tokens goes to the same
            share of the compared ones.
        merge: "mean" of a pair, or "prune", which drops the compared patch.
        weighted: Whether a mean counts the patches behind each token.

    Source: Shi et al., "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training",
    arXiv:2412.12496, section 3.
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
        self.metric = one_of("metric", metric, METRICS)
        self.distance = one_of("distance", distance, DISTANCES)
        self.nearest = at_least("nearest", nearest, 1)
        self.ordered = one_of("order", order, ORDERS) == "kept"
        self.pruned = one_of("merge", merge, MERGES) == "prune"
        self.weighted = switch("weighted", weighted)
        self.needs = frozenset() if metric == "hidden" else frozenset({metric})
        self.class_policy = "proportional" if self.ordered else "exact"

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Pair the `count` patches that are nearest to their partners."""
        features = tokens.x  # (batch, length, width)
        if self.metric != "hidden":
            features = tokens.intermediate(self.metric).mean(dim=1)
        cls_index, length = tokens.cls_index, tokens.position.shape[1]
        if self.ordered and self._fast and not self.pruned:
            return in_order(features, count, cls_index)
        source, target = self._ranked(features, cls_index)
        rest, source, target = source[:, count:], source[:, :count], target[:, :count]
        keep = others(source, length)
        if not self.ordered:
            keep = _score_first(rest, source, cls_index, length)
        merged = 0 if self.pruned else count
        return Selection(keep, source[:, :merged], target[:, :merged])

    def limit(self, length: int, cls_index: Indices) -> int:
        """Return half of the patches, rounded up, if the others are enough to choose from."""
        patches = length - len(cls_index)
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

    def _ranked(self, features: Tensor, cls_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return every second patch and its partner, the nearest pair first."""
        patches = others(cls_index, features.shape[1])
        half = patches.shape[1] // 2
        if self._fast:
            _, source, target, _ = in_order(features, patches.shape[1] - half, cls_index)
            return source, target
        score = _similarity(select_rows(features.detach(), patches).float(), self.distance)
        ranking = score.sort(dim=2, descending=True, stable=True)
        best, partner = (found[..., self.nearest - 1] for found in ranking)  # (batch, even)
        first = best.sort(dim=1, descending=True, stable=True).indices
        source, target = 2 * first, 2 * partner.gather(1, first) + 1
        return patches.gather(1, source), patches.gather(1, target)


@REDUCERS.register("stm")
class SequentialMerging(Reducer):
    """Merges the patches that are most like a neighbour, by cosine, and keeps their order.

        0 1 2 3 4 5 6 [class] 7 8 9      0, 2, 4, ... may join the patch before or behind them

    Patches are counted without the class tokens, from 0.  Every even one is compared with its
    neighbours, which are odd; the count that are most like one are folded into it.  A group is
    therefore one odd patch, maybe with the one before it and the one behind.

    Args:
        neighbours: "both", or "next" for pairs of an even patch and the odd one behind it.
        radius: Tokens on either side of a class token that take no part; 0 or more.
        weighted: Whether a mean counts the patches behind each token.

    Source: "Sequential Token Merging", arXiv:2509.22691, of which we know the abstract: patches
    merge with their neighbours in both directions, and those around the class token are left alone.
    How neighbours are compared and how far protection reaches is our choice.
    """

    hook = "after"

    def __init__(
        self, *, neighbours: str = "both", radius: int = 1, weighted: bool = False
    ) -> None:
        super().__init__()
        self.backward = one_of("neighbours", neighbours, NEIGHBOURS) == "both"
        self.radius = at_least("radius", radius, 0)
        self.weighted = switch("weighted", weighted)

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Fold the `count` even patches most like a neighbour into it; order stays."""
        length = tokens.x.shape[1]
        patches = others(tokens.cls_index, length)
        rows = select_rows(tokens.x.detach(), patches).float()
        # Of each patch with the next, (batch, patches - 1); NaN comes first.
        score = F.cosine_similarity(rows[:, :-1], rows[:, 1:], dim=2, eps=1e-12).nan_to_num(2.0)
        score = score.masked_fill(self._protected(patches, tokens.cls_index), -torch.inf)
        ahead = F.pad(score, (0, 1), value=-torch.inf)[:, 0::2]  # (batch, even)
        behind = F.pad(score, (1, 0), value=-torch.inf)[:, 0::2]
        back = (behind > ahead) & self.backward
        best = torch.where(back, behind, ahead)
        even = 2 * best.sort(dim=1, descending=True, stable=True).indices[:, :count]
        odd = even + torch.where(back, -1, 1).gather(1, even // 2)
        source, target = patches.gather(1, even), patches.gather(1, odd)
        return Selection(others(source, length), source, target)

    def limit(self, length: int, cls_index: Indices) -> int:
        """Return the even patches that have a neighbour, where both are unprotected."""
        return len(self._movable(length, cls_index))

    def cls_index_after(self, length: int, cls_index: Indices, count: int) -> set[Indices]:
        """Return every arrangement of the class tokens that some features lead to."""
        movable = self._movable(length, cls_index)
        before = [bisect_left(movable, index) for index in cls_index]
        return {
            tuple(index - gone for index, gone in zip(cls_index, ahead, strict=True))
            for ahead in _gone_before(before, len(movable), count, step=0)
        }

    def _protected(self, patches: Tensor, cls_index: Tensor) -> Tensor:
        """Return which neighbours may not merge, (batch, patches - 1), bool."""
        near = (patches[..., None] - cls_index[:, None]).abs() <= self.radius
        protected = near.any(dim=2)
        return protected[:, :-1] | protected[:, 1:]

    def _movable(self, length: int, cls_index: Indices) -> list[int]:
        """Return the indices of the even patches that can be folded into another, ascending."""
        patches = [index for index in range(length) if index not in cls_index]
        free = [all(abs(p - c) > self.radius for c in cls_index) for p in patches] + [False]
        return [
            index
            for n, index in enumerate(patches)
            if n % 2 == 0 and free[n] and (free[n + 1] or (self.backward and n and free[n - 1]))
        ]


def _gone_before(
    marks: list[int], candidates: int, count: int, *, step: int = 1
) -> Iterator[tuple[int, ...]]:
    """Return how many of `count` tokens may go before each mark, in every way they can be spread.

    Args:
        marks: Places among the candidates, ascending.
        candidates: Tokens that may go, the marks among them if step is 1.
        count: Tokens that go.
        step: Places that a mark itself takes.
    """
    ends = (-step, *marks, candidates)
    gaps = [b - a - step for a, b in pairwise(ends)]
    for gone in product(*(range(min(gap, count) + 1) for gap in gaps[:-1])):
        if 0 <= count - sum(gone) <= gaps[-1]:
            yield tuple(accumulate(gone))


def _similarity(rows: Tensor, distance: str) -> Tensor:
    """Compare rows at even places with those at odd ones, the more alike the larger.

    (batch, patches, width) -> (batch, even, odd), float32

    Products are in float64 and distances without one, out of reach of what users allow float32's.
    """
    norm = rows.norm(dim=2, keepdim=True)
    rows = rows / norm.clamp_min(1e-12)
    even, odd = rows[:, 0::2], rows[:, 1::2]
    if distance == "cosine":
        return (even.double() @ odd.double().mT).float()
    power = 1.0 if distance == "l1" else 2.0
    return -torch.cdist(even, odd, p=power, compute_mode="donot_use_mm_for_euclid_dist")


def _score_first(rest: Tensor, source: Tensor, cls_index: Tensor, length: int) -> Tensor:
    """Order kept tokens as R-MeeTo does where order is lost.

    Args:
        rest: Compared patches that stay, the one most like its partner first, (batch, rest).
        source: Compared patches that go, (batch, count).
        cls_index: Where class tokens are, ascending, (batch, k).
        length: Tokens before.
    """
    compared = torch.cat((rest, source, cls_index), dim=1)
    patches = torch.cat((rest, others(compared, length)), dim=1)
    share = cls_index * rest.shape[1] // (rest.shape[1] + source.shape[1])
    rank = torch.arange(cls_index.shape[1], device=rest.device)
    new = (share - rank).cummax(dim=1).values + rank if len(rank) else share
    return interspersed(patches, cls_index, new)
