"""Merge similar tokens: the paper's way, and one that keeps the order of the scan.

Tokens at even places are compared with tokens at odd places.  Each even token points at the odd
token most like it, and the count most similar pairs become one token each, at the odd token's
place.  Several even tokens may join the same odd one.

Source: Shen et al., "Famba-V", arXiv:2409.09808, section 3; the matching is the balanced
bipartite one of Bolya et al., "Token Merging", arXiv:2210.09461, section 3.
"""

from __future__ import annotations

from itertools import accumulate, pairwise, product

import torch
from torch import Tensor

from fambav.layers import Tokens
from fambav.reduction.reducer import Places, Reducer, Selection, merge
from fambav.registry import REDUCERS


@REDUCERS.register("famba-v")
class FambaV(Reducer):
    """The paper's fusion: plain means, even survivors first and then the odd places.

    A group's mean counts each of its tokens once, whatever its size.  Class tokens stay in the
    sequence and their scores are masked, so that they neither move into others nor take any in.
    """

    def reduce(self, tokens: Tokens, count: int) -> Tokens:
        """Fuse the `count` most similar pairs; scan order is lost."""
        selection = evens_then_odds(tokens.x, count, tokens.class_places)
        return merge(tokens, selection, weight=torch.ones_like(tokens.size))

    @staticmethod
    def limit(length: int, class_places: Places) -> int:
        """Return the even places without a class token, if any odd place has none."""
        odd = sum(place % 2 for place in class_places)
        even = len(class_places) - odd
        return length - length // 2 - even if length // 2 > odd else 0

    @staticmethod
    def moved(length: int, class_places: Places, count: int) -> set[Places]:
        """Return every arrangement of the class tokens that some features lead to.

        One at an odd place goes where all odd places go.  One at an even place is followed by the
        even places behind it, and ends up as many places forward as tokens went before it.
        """
        survivors = length - length // 2 - count
        halves = sorted(place // 2 for place in class_places if place % 2 == 0)
        gaps = [b - a - 1 for a, b in pairwise((-1, *halves, survivors + count))]
        out = set()
        for gone in product(*(range(min(gap, count) + 1) for gap in gaps[:-1])):
            if 0 <= count - sum(gone) <= gaps[-1]:
                ahead = dict(zip(halves, accumulate(gone), strict=True))
                new = (
                    p // 2 + survivors if p % 2 else p // 2 - ahead[p // 2] for p in class_places
                )
                out.add(tuple(new))
        return out


@REDUCERS.register("ordered")
class Ordered(Reducer):
    """Fusion for a scan: order is kept, and a mean counts the patches behind each token.

    Class tokens are taken out before the places are split into even and odd, and put back at
    their rank among the patches that are left.  The order-keeping form is ours.
    """

    def reduce(self, tokens: Tokens, count: int) -> Tokens:
        """Fuse the `count` most similar pairs of patches; positions stay ascending."""
        selection = in_order(tokens.x, count, tokens.class_places)
        return merge(tokens, selection, weight=tokens.size)

    @staticmethod
    def limit(length: int, class_places: Places) -> int:
        """Return half of the patches, rounded up, if there are two or more."""
        patches = length - len(class_places)
        return patches - patches // 2 if patches > 1 else 0


def evens_then_odds(x: Tensor, count: int, class_places: Tensor) -> Selection:
    """Pair even with odd places; the even ones that are left come first, then all odd ones.

    Args:
        x: Features to compare, (batch, length, dim).
        count: Pairs to make, at most `FambaV.limit`.
        class_places: Tokens that stay alone, (batch, k), int64.

    Returns:
        The pairs, and both parts in ascending order.
    """
    length = x.shape[1]
    source, target = match(x, count, masked=class_places)
    even = 2 * others(source // 2, length - length // 2)
    odd = torch.arange(1, length, 2, device=x.device).expand(len(x), -1)
    return Selection(torch.cat((even, odd), dim=1), source, target)


def in_order(x: Tensor, count: int, class_places: Tensor) -> Selection:
    """Pair every second patch with one between; what is left stays in its order.

    Args:
        x: Features to compare, (batch, length, dim).
        count: Pairs to make, at most `Ordered.limit`.
        class_places: Tokens that do not count as patches, (batch, k), int64.

    Returns:
        The pairs, and all places that are left in ascending order.
    """
    length = x.shape[1]
    patches = others(class_places, length)
    features = x.detach().gather(1, patches[..., None].expand(-1, -1, x.shape[2]))
    source, target = (patches.gather(1, places) for places in match(features, count))
    return Selection(others(source, length), source, target)


@torch.no_grad()
def match(x: Tensor, count: int, *, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the pairs of an even and an odd place that are most alike, by cosine.

    Compared in float32.  Of equal scores the lower place wins, among targets and among sources.
    A token of zeros is equally unlike all others.

    Args:
        x: Features to compare, (batch, length, dim).
        count: Pairs to choose, at most the even places that may be paired.
        masked: Places that may not be paired, (batch, k), int64; None if all may.

    Returns:
        source, target: Even and odd places, the best pair first, (batch, count), int64.  Sources
        are distinct.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        even, odd = x[:, 0::2], x[:, 1::2]
        scale = 1 / x.norm(dim=-1).clamp_min(1e-12)
        score = (even @ odd.mT).mul_(scale[:, 0::2, None]).mul_(scale[:, None, 1::2])
    if masked is not None and masked.shape[1]:
        taken = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        taken = taken.scatter(1, masked, value=True)
        score.masked_fill_(taken[:, 0::2, None] | taken[:, None, 1::2], -torch.inf)
    best, partner = score.max(dim=-1)
    source = best.sort(dim=-1, descending=True, stable=True).indices.narrow(1, 0, count)
    return 2 * source, 2 * partner.gather(1, source) + 1


def others(places: Tensor, length: int) -> Tensor:
    """Return the places of 0 .. length-1 that are not among `places`, ascending.

    Args:
        places: Distinct places, (batch, k), int64.
        length: Places there are.

    Returns:
        (batch, length - k), int64.
    """
    batch, k = places.shape
    skipped = places.sort(dim=1).values - torch.arange(k, device=places.device)
    rank = torch.arange(length - k, device=places.device).expand(batch, -1).contiguous()
    return rank + torch.searchsorted(skipped, rank, right=True)
