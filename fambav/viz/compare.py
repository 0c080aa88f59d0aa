"""The strategies of Famba-V side by side on the same weights, with about as many tokens removed.

Lower and upper fuse in 19 of 24 layers, as in the paper, or in that share of another depth.
Source: Shen et al., "Famba-V", arXiv:2409.09808, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from fambav.models import Backbone, Hierarchical
from fambav.reduction import (
    Reducer,
    Reduction,
    StagedReduction,
    from_fusion,
    make_reducer,
    make_schedule,
    no_reduction,
)
from fambav.registry import METHODS, STRATEGIES

OWN = "this run"
_SHARE = 19 / 24  # of the layers that lower and upper fuse in
_REMOVED = 0.75  # of the tokens, where the model itself removes none
_GENERAL = METHODS[0]  # can be done anywhere


def described(reduction: Reduction | StagedReduction) -> str:
    """Describe a reduction in a few words: method, tokens at which layers, scan."""
    if not reduction.schedule.removed:
        return "no reduction"
    scan = "" if reduction.scan == "compact" else f", {reduction.scan} scan"
    return f"{reduction.name}, {removal(reduction)}{scan}"


def removal(reduction: Reduction | StagedReduction) -> str:
    """Describe how many tokens are removed at which layers."""
    schedule = reduction.schedule
    layers = [n for n, count in enumerate(schedule.counts, start=1) if count]
    sizes = sorted({schedule.counts[n - 1] for n in layers}, reverse=True)
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    if isinstance(reduction, StagedReduction):
        names = ", ".join(schedule.names[n - 1] for n in layers)
        return f"{each} tokens at layer{'s' if len(layers) > 1 else ''} {names}"
    return f"{each} tokens at {_listed(layers)}"


def compare_strategies(model: Backbone) -> tuple[str, dict[str, Reduction]]:
    """Build the reduction of every strategy for a model, beside the model's own.

    The method is the model's, famba-v if it has none or it cannot do them all; about as many tokens
    are removed as the model removes.

    Returns:
        The name of the method, and a reduction for each strategy that the model's depth and length
        allow, by a label with its L and r.  The model's own is marked; it comes last if it equals
        no strategy.
    """
    if not isinstance(model, Backbone):
        staged = isinstance(model, Hierarchical) and model.reducible
        more = "of a single stage, in which strategies count layers"
        raise ValueError(
            f"model is a {type(model).__name__}, expected one"
            f" {more if staged else 'whose tokens can be reduced'}"
        )
    own = model.reduction
    method, made = own.name, _strategies(own, own.method or make_reducer(_GENERAL))
    if own.method is None:
        method = _GENERAL
    elif not all(made.values()):
        method, made = (
            f"{_GENERAL} ({method} cannot do them all)",
            _strategies(own, make_reducer(_GENERAL)),
        )
    reductions = {}
    for name, reduction in made.items():
        if reduction is not None:
            same = reduction.name == own.name or not own.schedule.removed
            is_own = same and reduction.schedule.counts == own.schedule.counts
            label = _label(name, reduction)
            reductions[f"{label}\n({OWN})" if is_own else label] = own if is_own else reduction
    if own not in reductions.values():
        reductions[f"{OWN}\n{removal(own)}".replace(" at", "\nat")] = own
    return method, reductions


@contextmanager
def reducing(model: Any, reduction: Reduction | StagedReduction) -> Iterator[None]:
    """Give a model whose tokens can be reduced another reduction for a while."""
    before = model.reduction
    model.reduction = reduction.train(model.training)
    try:
        yield
    finally:
        model.reduction = before


def _strategies(own: Reduction, method: Reducer) -> dict[str, Reduction | None]:
    """Set up every strategy that the depth allows, by name; None where the method cannot do it."""
    names = [name for name in STRATEGIES if own.info.depth > 1 or name != "interleaved"]
    return {name: _strategy(name, method, own) for name in names}


def _strategy(name: str, method: Reducer, like: Reduction) -> Reduction | None:
    """Build a strategy that removes as many tokens as `like`, or as fit; None if none do."""
    info = like.info
    if name == "none":
        return no_reduction(info)
    many = max(1, round(_SHARE * info.depth))
    layer = {"lower": many, "upper": info.depth - many + 1}.get(name)
    layers = {"all": info.depth, "interleaved": info.depth // 2}.get(name, many)
    wanted = like.schedule.removed or round(_REMOVED * info.tokens)
    for count in range(max(1, round(wanted / layers)), 0, -1):
        try:
            text = from_fusion(name, depth=info.depth, layer=layer, token=count) or ""
            if like.method is not method:
                return Reduction(info, method, make_schedule(text, info, method))
            return Reduction(
                info,
                method,
                make_schedule(text, info, method, hook=like.hook),
                hook=like.hook,
                scan=like.scan,
                gap_policy=None if like.gap_policy == "none" else like.gap_policy,
                class_policy=like.class_policy,
            )
        except ValueError:
            continue
    return None


def _label(name: str, reduction: Reduction) -> str:
    """Write a strategy with its L, the first or last layer that fuses, and its r tokens."""
    counts = reduction.schedule.counts
    layers = [n for n, count in enumerate(counts, start=1) if count]
    if not layers:
        return name
    layer = {"lower": f"L = {layers[-1]}, ", "upper": f"L = {layers[0]}, "}.get(name, "")
    return f"{name}\n{layer}r = {counts[layers[0] - 1]}"


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
