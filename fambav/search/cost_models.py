"""Cost models of a plan: token-layers, operations, milliseconds.

Milliseconds are measured in rounds that alternate with the unreduced model, so that a busy machine
slows both alike.  A plan's time is the median ratio over the rounds, times the first median of the
unreduced model.  Small differences remain noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fambav import flops
from fambav.bench.timing import interleave, ratio
from fambav.engine.precision import Precision
from fambav.models import Backbone, Hierarchical
from fambav.reduction import Reduction, StagedReduction, make_any_reduction
from fambav.search.space import Counts, SearchSpace

CostModel = Callable[[Counts], float]

ROUNDS, WARMUP = 15, 2


def token_layers(space: SearchSpace) -> CostModel:
    """Return a cost model: the share of token-layers that remain."""
    return space.share


def flop_share(space: SearchSpace, net: Backbone | Hierarchical) -> CostModel:
    """Return a cost model: the share of operations that remain, as papers count them."""
    known: dict[Counts, float] = {}

    def cost(counts: Counts) -> float:
        if counts not in known:
            report = flops.count(net, space.reduction(counts))
            known[counts] = report.total.literature / report.unreduced.literature
        return known[counts]

    return cost


class Stopwatch:
    """Times a model under reductions.

    Args:
        net: In evaluation mode, on its device.
        images: One batch, (batch, channels, height, width), on that device.
        precision: Format of the forward pass.

    Attributes:
        unreduced: Milliseconds of a batch without reduction, measured the first time; None before.
    """

    def __init__(self, net: Backbone | Hierarchical, images: Tensor, precision: Precision) -> None:
        self.net: Any = net
        self.images, self.precision = images, precision
        self.unreduced: float | None = None

    def times(self, reductions: Sequence[Reduction | StagedReduction]) -> tuple[float, list[float]]:
        """Return milliseconds of a batch: without reduction, and under each reduction."""
        baseline = make_any_reduction(self.net.info).eval()
        before, runs = self.net.reduction, dict(enumerate(map(self._run, (baseline, *reductions))))
        try:
            times = interleave(runs, rounds=ROUNDS, warmup=WARMUP, device=self.images.device)
        finally:
            self.net.reduction = before
        unreduced = self.unreduced = self.unreduced or statistics.median(times[0])
        ratios = (ratio(times[n], times[0]) or 1.0 for n in range(1, len(runs)))
        return unreduced, [unreduced * share for share in ratios]

    def _run(self, reduction: Reduction | StagedReduction) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> Tensor:
            self.net.reduction = reduction
            with self.precision.autocast():
                logits: Tensor = self.net(self.images)
            return logits

        return run
