"""The objective: how far a plan moves a model's predictions from those as trained.

Many plans are evaluated at once, each common prefix computed once: plans that remove the same
tokens at the first layers go through these together, like the branches of a tree, so that a plan
that differs from another at the last layer takes one layer more.  In a model of stages
branches part where stages begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.engine.finite import NotFiniteError, check_logits
from fambav.engine.precision import Precision
from fambav.layers import Tokens
from fambav.models import Backbone, Hierarchical
from fambav.reduction import Reduction, StagedReduction
from fambav.search.space import Counts, Plan, SearchSpace


class PlanScore(NamedTuple):
    """A plan on the images of a search.

    Attributes:
        loss: The smaller the better; 0 or more.
        metric: Share of images whose class is predicted, in percent.
    """

    loss: float
    metric: float


class Objective:
    """Scores plans on fixed images, each plan once.

    Args:
        net: In evaluation mode, on its device.
        images: (images, channels, height, width), on that device.
        labels: Their classes, (images,), int64, there too.
        kind: "distance", the mean Kullback-Leibler divergence from the predictions under
            `reference`, in nats; or "accuracy", the error rate, to which the mean cross-entropy
            over the number of images is added, so that of plans with equal error the more confident
            one wins.
        reference: What the model was trained with.
        precision: Format of the forward pass.
        batch_size: Images that are evaluated together.

    Attributes:
        scores: All scores so far, in the order of evaluation.

    Raises:
        NotFiniteError: If a logit under the reference is not finite.
    """

    def __init__(
        self,
        net: Backbone | Hierarchical,
        images: Tensor,
        labels: Tensor,
        *,
        kind: str,
        reference: Reduction | StagedReduction,
        precision: Precision,
        batch_size: int = 128,
    ) -> None:
        self.net, self.batches, self.labels = net, images.split(batch_size), labels
        self.kind, self.precision = kind, precision
        self.scores: dict[Plan, PlanScore] = {}
        (logits,) = self._logits([reference])
        for batch, own in zip(self.batches, logits.split(batch_size), strict=True):
            check_logits(net, batch, own, "the images of the search", precision=precision)
        self.reference = logits.double().log_softmax(dim=1)  # (images, classes)

    def losses(self, space: SearchSpace, plans: Sequence[Counts]) -> list[float]:
        """Return the loss of each plan; those without a score are evaluated together.

        Raises:
            NotFiniteError: If a logit is not finite.
        """
        named = [space.plan(counts) for counts in plans]
        new = [plan for plan in dict.fromkeys(named) if plan not in self.scores]
        if new:
            logits = self._logits([space.reduction(plan.counts) for plan in new])
            for plan, own in zip(new, logits, strict=True):
                if not own.isfinite().all():
                    raise NotFiniteError(
                        f"logits under {plan.method} {plan.summary()} are not finite, expected"
                        " finite numbers"
                    )
                self.scores[plan] = self._score(own)
        return [self.scores[plan].loss for plan in named]

    def _logits(self, reductions: Sequence[Reduction | StagedReduction]) -> list[Tensor]:
        return prefix_shared_logits(self.net, self.batches, reductions, self.precision)

    def _score(self, logits: Tensor) -> PlanScore:
        predicted = logits.double().log_softmax(dim=1)  # (images, classes)
        wrong = (predicted.argmax(dim=1) != self.labels).double().mean().item()
        if self.kind == "distance":
            loss = F.kl_div(predicted, self.reference, log_target=True, reduction="batchmean")
        else:
            loss = wrong + F.nll_loss(predicted, self.labels) / len(self.labels)
        return PlanScore(max(float(loss), 0.0), 100 * (1 - wrong))


@torch.no_grad()
def prefix_shared_logits(
    net: Backbone | Hierarchical,
    batches: Iterable[Tensor],
    reductions: Sequence[Reduction | StagedReduction],
    precision: Precision,
) -> list[Tensor]:
    """Return a model's logits under each of several reductions.

    Args:
        net: In evaluation mode; its own reduction is restored.
        batches: Images, (batch, channels, height, width), on the model's device.
        reductions: At least one, in evaluation mode, for this model.
        precision: Format of the forward pass.

    Returns:
        For each reduction (images, classes), float32.
    """
    before, parts = net.reduction, list[list[Tensor]]()
    logits: dict[int, Tensor] = {}  # of a batch, by the index of the reduction
    walk = _by_stage(net) if isinstance(net, Hierarchical) else _by_layer(net)

    def descend(state: Any, step: int, group: Iterable[int]) -> None:
        """Go the steps from `step` on, for reductions that act alike up to there."""
        if step == walk.steps:
            logits.update(dict.fromkeys(group, walk.end(state)))
            return
        branches: dict[Any, list[int]] = {}
        for index in group:
            branches.setdefault(walk.action(reductions[index], step), []).append(index)
        for branch in branches.values():
            descend(walk.step(state, step, reductions[branch[0]]), step + 1, branch)

    try:
        for images in batches:
            with precision.autocast():
                descend(net.embed(images), 0, range(len(reductions)))
            parts.append([logits[index].float() for index in range(len(reductions))])
    finally:
        cast(Any, net).reduction = before
    return [torch.cat(own) for own in zip(*parts, strict=True)]


class _Walk(NamedTuple):
    """How a model goes from an embedded image to logits, in steps where reductions may part.

    Attributes:
        steps: How many.
        step: Goes one, from 0, under a reduction.
        action: All that a reduction does in a step; equal ones are computed once.
        end: Returns logits.
    """

    steps: int
    step: Callable[[Any, int, Any], Any]
    action: Callable[[Any, int], Any]
    end: Callable[[Any], Tensor]


def _by_layer(net: Backbone) -> _Walk:
    def step(tokens: Tokens, layer: int, reduction: Reduction) -> Tokens:
        net.reduction = reduction
        after: Tokens = net.layers[layer](tokens, net.hooks(layer, tokens))
        return after

    return _Walk(net.depth, step, _action, net.classify)


def _by_stage(net: Hierarchical) -> _Walk:
    def step(x: Tensor, stage: int, reduction: StagedReduction) -> Tensor:
        x = net.next_map(stage - 1, x) if stage else x
        own, blocks = reduction.stage(stage), net.stages[stage]
        after: Tensor = blocks(x, own.hooks) if own.schedule.removed else blocks(x)
        return after

    def action(reduction: StagedReduction, stage: int) -> Any:
        own = reduction.stage(stage)
        return tuple(_action(own, layer) for layer in range(own.info.depth))

    return _Walk(len(net.dims), step, action, lambda x: net.forward_head(net.last_map(x)))


def _action(reduction: Reduction, layer: int) -> Any:
    """Return all that a reduction does at a layer; equal actions are computed once."""
    hooks, count = reduction.hooks(layer), reduction.schedule.counts[layer]
    return count and reduction.name, count, hooks.want, hooks.gap_policy, hooks.positions
