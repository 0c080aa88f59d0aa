"""What a plan costs: token-layers, operations, milliseconds.

Milliseconds are measured beside the model with all tokens, round by round, so that a busy machine
slows both alike; the median over rounds of their ratio, times the first median of the model with
all tokens, is the cost.  Small differences are noise all the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fambav import costs
from fambav.bench.timing import interleave, ratio
from fambav.engine.precision import Precision
from fambav.models import Backbone
from fambav.reduction import Reduction, no_reduction
from fambav.search.space import Counts, Space

Price = Callable[[Counts], float]

ROUNDS, WARMUP = 15, 2


def token_layers(space: Space) -> Price:
    """Return what tells the share of token-layers that a plan leaves."""
    return lambda counts: space.reduction(counts).schedule.share


def flops(space: Space, net: Backbone) -> Price:
    """Return what tells the share of operations, as papers count them, that a plan leaves."""
    known: dict[Counts, float] = {}

    def price(counts: Counts) -> float:
        if counts not in known:
            before, net.reduction = net.reduction, space.reduction(counts)
            try:
                report = costs.count(net)
            finally:
                net.reduction = before
            known[counts] = report.total.literature / report.dense.literature
        return known[counts]

    return price


class Clock:
    """Times a model under reductions.

    Args:
        net: In evaluation mode, on its device.
        images: One batch, (batch, channels, height, width), on that device.
        precision: Format of the forward pass.

    Attributes:
        whole: Milliseconds of a batch with all tokens, measured the first time; None before.
    """

    def __init__(self, net: Backbone, images: Tensor, precision: Precision) -> None:
        self.net, self.images, self.precision = net, images, precision
        self.whole: float | None = None

    def times(self, reductions: Sequence[Reduction]) -> tuple[float, list[float]]:
        """Return milliseconds of a batch: with all tokens, and under each reduction."""
        dense = no_reduction(self.net.info).eval()
        before, runs = self.net.reduction, dict(enumerate(map(self._run, (dense, *reductions))))
        try:
            found = interleave(runs, rounds=ROUNDS, warmup=WARMUP, device=self.images.device)
        finally:
            self.net.reduction = before
        whole = self.whole = self.whole or statistics.median(found[0])
        shares = (ratio(found[n], found[0]) or 1.0 for n in range(1, len(runs)))
        return whole, [whole * share for share in shares]

    def _run(self, reduction: Reduction) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> Tensor:
            self.net.reduction = reduction
            with self.precision.autocast():
                said: Tensor = self.net(self.images)
            return said

        return run
