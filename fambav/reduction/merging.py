"""Merge similar tokens: the ways of Famba-V and ToMe, and one that keeps the order of the scan.

Tokens at even places are compared with tokens at odd places.  Each even token points at the odd
token most like it, and the count most similar pairs become one token each, at the odd token's
place.  Several even tokens may join the same odd one.

Source: Shen et al., "Famba-V", arXiv:2409.09808, section 3; the matching is the balanced
bipartite one of Bolya et al., "Token Merging", arXiv:2210.09461, section 3.
"""

from __future__ import annotations

from itertools import accumulate, pairwise, product

from fambav.layers import Tokens
from fambav.ops.match import Selection, evens_then_odds, in_order
from fambav.reduction.reducer import Places, Reducer
from fambav.registry import REDUCERS


@REDUCERS.register("famba-v")
class FambaV(Reducer):
    """The paper's fusion: plain means, even survivors first and then the odd places.

    A group's mean counts each of its tokens once, whatever its size.  Class tokens stay in the
    sequence and their scores are masked, so that they neither move into others nor take any in.
    """

    ordered = weighted = False

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Pair the `count` most similar tokens; scan order is lost."""
        return evens_then_odds(tokens.x, count, tokens.class_places)

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
    their rank among the patches that are left.  The order-keeping form is ours; on models that were
    trained dense it has been more accurate than `famba-v` at every operating point measured, at
    equal cost (benchmarks/README.md).
    """

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Pair the `count` most similar patches; positions stay ascending."""
        return in_order(tokens.x, count, tokens.class_places)

    @staticmethod
    def limit(length: int, class_places: Places) -> int:
        """Return half of the patches, rounded up, if there are two or more."""
        patches = length - len(class_places)
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
