"""Merge the tokens that write least to the state into some that write more.

    step sizes -> keep | target | source, from the largest to the smallest

Source: "Training-free Token Reduction for Vision Mamba", arXiv:2507.14042.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fambav.layers import Tokens
from fambav.ops.match import Selection, others
from fambav.reduction.reducer import Places, Reducer
from fambav.reduction.scores import most_alike, ranked, told
from fambav.registry import REDUCERS


@REDUCERS.register("mtr")
class MTR(Reducer):
    """Fold the patches of the smallest steps into the most alike of those of middling steps.

    A patch's score is its step size, the mean over channels summed over directions.  The `count`
    lowest are sources; those that score next are targets; the others are neither.  Each source
    joins the target most like it, by cosine, in a plain mean.  Order is kept.

    Args:
        targets: Targets for each source, 0.001 or more; their number is rounded up.  Where fewer
            patches are left than that, all of them are targets.

    Raises:
        ValueError: If targets is less.

    Source: arXiv:2507.14042, in which the sizes of the groups are not known to us.
    """

    hook = "after"
    weighted = False
    needs = frozenset({"delta"})

    def __init__(self, *, targets: float = 2.0) -> None:
        super().__init__()
        if not 1e-3 <= targets < math.inf:
            raise ValueError(f"reduction option targets is {targets}, expected 0.001 or more")
        self.targets = targets

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Fold the `count` patches of the smallest steps."""
        order = ranked(_steps(tokens), tokens.class_places)
        source = order[:, -count:]
        targets = math.ceil(round(count * self.targets, 6))
        middle = order[:, :-count][:, -targets:]
        _, target = most_alike(tokens.x, source, middle)
        return Selection(others(source, tokens.x.shape[1]), source, target)

    @staticmethod
    def limit(length: int, class_places: Places) -> int:
        """Return all patches but one."""
        return max(length - len(class_places) - 1, 0)


def _steps(tokens: Tokens) -> Tensor:
    delta = told(tokens, "delta").detach()
    return delta.mean(dim=-1, dtype=torch.promote_types(delta.dtype, torch.float32)).sum(dim=1)
