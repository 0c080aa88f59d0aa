"""Greedy search from all tokens down: again and again the step of least loss for what it saves.

A heuristic ranks the steps, and only the best are evaluated: merging tokens with near duplicates
is taken to be harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.engine.precision import Precision
from fambav.layers import Hooks, Tokens
from fambav.layers.hierarchy import changed_hooks
from fambav.models import Backbone, Hierarchical
from fambav.ops.match import others
from fambav.reduction import make_any_reduction
from fambav.search.space import Counts, Problem

Heuristic = Callable[[Counts, Counts], float]

EVALUATED = 8  # steps of the best rank, each at another layer


def greedy(
    problem: Problem,
    heuristic: Heuristic | None = None,
    *,
    steps: int,
    evaluated: int = EVALUATED,
) -> list[Counts]:
    """Remove tokens where it harms least until the budget is met.

    A step removes more tokens at one layer, the fewest that save their share of what must be saved.
    Of all steps the one with the least loss for its saving is taken; what the last one saves beyond
    the budget counts for nothing.

    Args:
        problem: Some plan meets its budget.
        heuristic: Estimates from two plans the harm of the step between them; without it every step
            is evaluated.
        steps: Into how many the saving is divided, at least 1; more are finer and slower.
        evaluated: How many of the steps that the heuristic ranks best are evaluated.

    Returns:
        The plan after each step; the last is the first that meets the budget, with its slack used.

    Raises:
        ValueError: If no plan meets the budget.
    """
    path = [problem.unreduced]
    saving = problem.excess(problem.unreduced) / steps
    while problem.excess(path[-1]):
        here = path[-1]
        removed = (problem.remove_more(here, layer, saving) for layer in range(problem.depth))
        candidates = [counts for counts in removed if counts is not None]
        if not candidates:
            cheapest = problem.cheapest()
            if problem.excess(cheapest):
                raise ValueError(f"budget is {problem.most}, expected {problem.cost(cheapest)}")
            return [*path, problem.use_slack(cheapest, range(problem.depth))]
        if heuristic is not None and len(candidates) > evaluated:
            candidates.sort(
                key=lambda counts: _rate(problem, here, counts, heuristic(here, counts))
            )
            candidates = candidates[:evaluated]
        loss, *losses = problem.losses([here, *candidates])
        rates = [
            (_rate(problem, here, counts, after - loss), counts)
            for counts, after in zip(candidates, losses, strict=True)
        ]
        path.append(min(rates)[1])
    return [*path[:-1], _with_slack_used(problem, path[-1])]


def _rate(problem: Problem, before: Counts, after: Counts, harm: float) -> float:
    """Return the harm of a step for each unit it saves, up to the saving that is needed."""
    return harm / min(problem.cost(before) - problem.cost(after), problem.excess(before))


def _with_slack_used(problem: Problem, counts: Counts) -> Counts:
    """Use the slack at the first layers first or at the last, whichever is better."""
    layers = range(problem.depth)
    candidates = [problem.use_slack(counts, order) for order in (layers, layers[::-1])]
    candidates = list(dict.fromkeys([*candidates, counts]))
    return min(zip(problem.losses(candidates), candidates, strict=True))[1]


@torch.no_grad()
def pair_similarity(
    net: Backbone | Hierarchical, images: Tensor, precision: Precision
) -> list[Tensor]:
    """Return the cosine of the r-th most similar pair of patches at each layer, all tokens kept.

    Patches at even indices are compared with those at odd ones, on the normalised stream, as
    `fambav.reduction.merging` does.

    Args:
        net: In evaluation mode; its own reduction is restored.
        images: (batch, channels, height, width), on the model's device.
        precision: Format of the forward pass.

    Returns:
        Of each layer means over the images, (pairs,), float64, on the CPU; falling.
    """
    before, rows = net.reduction, list[Tensor]()

    def record(tokens: Tokens) -> Tokens:
        rows.append(_sorted_similarity(tokens).mean(dim=0).cpu())
        return tokens

    cast(Any, net).reduction = make_any_reduction(net.info).eval()
    try:
        with precision.autocast():
            if isinstance(net, Hierarchical):
                with changed_hooks(net.stages, lambda *_: Hooks(between=record)):
                    net(images)
            else:
                tokens = net.embed(images)
                for layer, block in enumerate(net.layers):
                    tokens = block(tokens, net.hooks(layer, tokens)._replace(between=record))
    finally:
        cast(Any, net).reduction = before
    return rows


def _sorted_similarity(tokens: Tokens) -> Tensor:
    """Return the cosine of each even patch with the odd one most similar to it, highest first.

    A patch alone has none.
    """
    index = others(tokens.cls_index, tokens.x.shape[1])
    # (batch, length, dim) -> (batch, patches, dim) -> (batch, even patches)
    patches = tokens.x.gather(1, index[..., None].expand(-1, -1, tokens.x.shape[2]))
    patches = F.normalize(patches.double(), dim=2, eps=1e-30)
    if patches.shape[1] < 2:
        return patches.new_empty(len(patches), 0)
    # One image after the other: a stage of 3136 tokens has 2.5 million pairs in each.
    best = torch.stack([(one[0::2] @ one[1::2].mT).amax(dim=1) for one in patches])
    return best.sort(dim=1, descending=True).values


def merged_dissimilarity(
    similarity: Sequence[Tensor], before: Sequence[int], after: Sequence[int]
) -> float:
    """Sum 1 - cosine over the pairs that one plan merges more than another.

    Args:
        similarity: As `pair_similarity` returns it.
        before: Tokens removed at each layer by the one.
        after: By the other, which may remove fewer at some layers.
    """
    total = 0.0
    for row, old, new in zip(similarity, before, after, strict=True):
        more = 1 - row[min(old, new) : max(old, new)]
        beyond = abs(new - old) - len(more)  # tokens without a pair count 1
        total += (float(more.sum()) + beyond) * (1 if new > old else -1)
    return total
