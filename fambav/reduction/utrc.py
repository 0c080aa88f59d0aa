"""Prune some and merge some: unified token reduction by importance classification.

    patches -> less important half -> most like one of the other half -> the strongest links
    x:         of the linked, some are pruned, the others merged        residual: all are merged

Source: Zhan et al., "Rethinking Token Reduction for State Space Models", arXiv:2410.14725.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fambav.layers import Tokens
from fambav.ops.match import Selection, others
from fambav.reduction.reducer import Places, Reducer
from fambav.reduction.scores import importance, most_alike, ranked, read_importance
from fambav.registry import REDUCERS


@REDUCERS.register("utrc")
class UTRC(Reducer):
    """Link the less important half of the patches to the rest, and fold the strongest links.

    All patches are ranked by importance.  The lower half, rounded down, is the paper's set A, the
    rest its set B.  Each a in A is linked to the b in B that is most like it, by cosine; the
    `count` most alike links are carried out, and their a go.  A share of these, those of least
    importance, is pruned: x does without them.  The others are merged: b becomes the plain mean of
    itself and all that joined it, (a + b) / 2 for one.  In the residual all of them are merged.

    Args:
        prune_share: Pruned of those that go, 0 to 1; their number is rounded, halves down.
        signal: As in `importance`; the paper's is that of the mixer's output.

    Raises:
        ValueError: If an option has no such value.

    Source: Zhan et al., arXiv:2410.14725, for language models, which have no class token; here one
    is in neither set.  Which of the linked tokens are pruned is not told there and our choice.
    """

    hook = "after"
    weighted = False

    def __init__(self, *, prune_share: float = 0.5, signal: str = "mixed") -> None:
        super().__init__()
        if not 0 <= prune_share <= 1:
            raise ValueError(f"reduction option prune_share is {prune_share}, expected 0 to 1")
        self.needs = read_importance(signal, "both")
        self.prune_share, self.signal = prune_share, signal

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Fold the `count` strongest links."""
        score = importance(tokens, signal=self.signal)
        order = ranked(score, tokens.class_places)
        rest, lower = order.tensor_split([order.shape[1] - order.shape[1] // 2], dim=1)
        lower = lower.sort(dim=1).values  # so that of equal links the lower place wins
        cosine, partner = most_alike(tokens.x, lower, rest)
        links = cosine.sort(dim=1, descending=True, stable=True).indices[:, :count]
        source, target = lower.gather(1, links), partner.gather(1, links)
        silent = self._silent(score.gather(1, source))
        return Selection(others(source, score.shape[1]), source, target, silent)

    def _silent(self, score: Tensor) -> Tensor:
        """Mark those of least score as pruned."""
        pruned = math.ceil(score.shape[1] * self.prune_share - 0.5)
        least = score.sort(dim=1, stable=True).indices[:, :pruned]
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, least, value=True)

    @staticmethod
    def limit(length: int, class_places: Places) -> int:
        """Return half of the patches, rounded down."""
        return (length - len(class_places)) // 2
