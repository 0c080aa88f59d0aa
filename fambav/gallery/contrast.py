"""The strategies of Famba-V side by side on the same weights, with about as many tokens removed.

Lower and upper fuse in 19 of 24 layers, as in the paper, or in that share of another depth.
Source: Shen et al., "Famba-V", arXiv:2409.09808, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from fambav.layers import BackboneInfo
from fambav.models import Backbone
from fambav.reduction import (
    Reducer,
    Reduction,
    Schedule,
    fusion,
    make_reducer,
    no_reduction,
)
from fambav.registry import METHODS, STRATEGIES

_SHARE = 19 / 24  # of the layers that lower and upper fuse in
_REMOVED = 0.75  # of the tokens, where the model itself removes none
_GENERAL = METHODS[0]  # can be done anywhere


def described(reduction: Reduction) -> str:
    """Say in a few words which tokens go where."""
    counts = reduction.schedule.counts
    layers = [n for n, count in enumerate(counts, start=1) if count]
    if not layers:
        return "no reduction"
    sizes = sorted({counts[n - 1] for n in layers}, reverse=True)
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    scan = "" if reduction.scan == "compact" else f", {reduction.scan} scan"
    return f"{reduction.name}, {each} tokens at {_listed(layers)}{scan}"


def contrasted(model: Backbone) -> tuple[str, dict[str, Reduction]]:
    """Set every strategy up for a model.

    Args:
        model: If it reduces tokens, its method is taken, and about as many tokens go.

    Returns:
        The name of the method, and a reduction for each strategy that the model's depth allows.
        Where the model's own method cannot do one of them, the method is famba-v instead.
    """
    own, info = model.reduction, model.info
    if own.method is not None:
        made = {name: _made(info, own.method, name, like=own) for name in _possible(info)}
        if all(made.values()):
            return own.name, {name: found for name, found in made.items() if found is not None}
    method = make_reducer(_GENERAL)
    made = {name: _made(info, method, name, like=own) for name in _possible(info)}
    return _GENERAL, {name: found for name, found in made.items() if found is not None}


@contextmanager
def reducing(model: Backbone, reduction: Reduction) -> Iterator[None]:
    """Let a model reduce its tokens so, and as before at the end."""
    before = model.reduction
    model.reduction = reduction.train(model.training)
    try:
        yield
    finally:
        model.reduction = before


def _possible(info: BackboneInfo) -> tuple[str, ...]:
    return tuple(name for name in STRATEGIES if info.depth > 1 or name != "interleaved")


def _made(
    info: BackboneInfo, method: Reducer, strategy: str, *, like: Reduction
) -> Reduction | None:
    """Set a strategy up, with as many tokens as `like` removes, or as fit; None if none do."""
    if strategy == "none":
        return no_reduction(info)
    many = max(1, round(_SHARE * info.depth))
    layer = {"lower": many, "upper": info.depth - many + 1}.get(strategy)
    layers = {"all": info.depth, "interleaved": info.depth // 2}.get(strategy, many)
    wanted = like.schedule.removed or round(_REMOVED * info.tokens)
    for count in range(max(1, round(wanted / layers)), 0, -1):
        try:
            plan = fusion(strategy, info=info, reducer=method, count=count, layer=layer)
            return _like(info, method, plan, like)
        except ValueError:
            continue
    return None


def _like(info: BackboneInfo, method: Reducer, plan: Schedule, like: Reduction) -> Reduction:
    """Return a reduction with the policies of another if it is of the same method."""
    if like.method is not method:
        return Reduction(info, method, plan)
    made = Schedule.of(plan.start, plan.counts, after=like.hook == "after")
    gap = None if like.gap == "none" else like.gap
    return Reduction(
        info, method, made, hook=like.hook, scan=like.scan, gap=gap, class_policy=like.class_policy
    )


def _listed(layers: list[int]) -> str:
    """Write "layer 3", "layers 3-6", "every 2nd layer from 2 to 6" or "layers 2, 3, 5"."""
    steps = {b - a for a, b in pairwise(layers)}
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if steps == {1}:
        return f"layers {layers[0]}-{layers[-1]}"
    if steps == {2} and len(layers) > 2:
        return f"every 2nd layer from {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"
