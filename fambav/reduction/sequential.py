"""Merge neighbours in the sequence, away from the class token.

    0 1 2 3 4 5 6 [class] 7 8 9      0, 2, 4, ... may join the patch before or behind them

Source: "Sequential Token Merging", arXiv:2509.22691, of which we know the abstract: patches merge
with their neighbours in both directions, and what is around the class token is left alone.  How
neighbours are compared and how far protection reaches is our choice.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.layers import Tokens
from fambav.ops.match import Selection, others
from fambav.reduction.reducer import Places, Reducer, at_least, chosen
from fambav.registry import REDUCERS

NEIGHBOURS = ("both", "next")


@REDUCERS.register("stm")
class SequentialMerging(Reducer):
    """Merges the patches that are most like a neighbour, by cosine, and keeps their order.

    Patches are counted without the class tokens, from 0.  Every even one looks at its neighbours,
    which are odd; the count that are most like one are folded into it.  A group is therefore one
    odd patch, maybe with the one before it and the one behind.

    Args:
        neighbours: "both", or "next" for pairs of an even patch and the odd one behind it.
        radius: Tokens on either side of a class token that take no part; 0 or more.
        weighted: Whether a mean counts the patches behind each token.
    """

    hook = "after"

    def __init__(
        self, *, neighbours: str = "both", radius: int = 1, weighted: bool = False
    ) -> None:
        super().__init__()
        self.backward = chosen("neighbours", neighbours, NEIGHBOURS) == "both"
        self.radius = at_least("radius", radius, 0)
        self.weighted = weighted

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Fold the `count` even patches most like a neighbour into it; order stays."""
        length = tokens.x.shape[1]
        patches = others(tokens.class_places, length)
        rows = tokens.x.detach().gather(1, patches[..., None].expand(-1, -1, tokens.x.shape[2]))
        rows = rows.float()
        alike = F.cosine_similarity(rows[:, :-1], rows[:, 1:], dim=2, eps=1e-12).nan_to_num(2.0)
        alike = alike.masked_fill(self._divided(patches, tokens.class_places), -torch.inf)
        ahead = F.pad(alike, (0, 1), value=-torch.inf)[:, 0::2]
        behind = F.pad(alike, (1, 0), value=-torch.inf)[:, 0::2]
        back = (behind > ahead) & self.backward
        score = torch.where(back, behind, ahead)
        even = 2 * score.sort(dim=1, descending=True, stable=True).indices[:, :count]
        odd = even + torch.where(back, -1, 1).gather(1, even // 2)
        source, target = patches.gather(1, even), patches.gather(1, odd)
        return Selection(others(source, length), source, target)

    def limit(self, length: int, class_places: Places) -> int:
        """Return the even patches that have a neighbour, where both are unprotected."""
        return len(self._movable(length, class_places))

    def moved(self, length: int, class_places: Places, count: int) -> set[Places]:
        """Return every arrangement of the class tokens that some features lead to."""
        movable = self._movable(length, class_places)
        ahead = [bisect_left(movable, place) for place in class_places]
        gaps = [b - a for a, b in pairwise((0, *ahead, len(movable)))]
        out = set()
        for gone in product(*(range(min(gap, count) + 1) for gap in gaps[:-1])):
            if 0 <= count - sum(gone) <= gaps[-1]:
                before = (sum(gone[: n + 1]) for n in range(len(gone)))
                out.add(tuple(p - g for p, g in zip(class_places, before, strict=True)))
        return out

    def _divided(self, patches: Tensor, class_places: Tensor) -> Tensor:
        """Say which neighbours may not merge, (batch, patches - 1), bool."""
        near = (patches[..., None] - class_places[:, None]).abs() <= self.radius
        protected = near.any(dim=2)
        return protected[:, :-1] | protected[:, 1:]

    def _movable(self, length: int, class_places: Places) -> list[int]:
        """Return the places of the even patches that can be folded into another, ascending."""
        patches = [place for place in range(length) if place not in class_places]
        free = [all(abs(p - c) > self.radius for c in class_places) for p in patches] + [False]
        return [
            place
            for n, place in enumerate(patches)
            if n % 2 == 0 and free[n] and (free[n + 1] or (self.backward and n and free[n - 1]))
        ]
