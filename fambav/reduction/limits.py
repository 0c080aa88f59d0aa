"""How many tokens can go at each layer, whatever the images; and what would fit instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from fambav.layers import BackboneInfo
from fambav.reduction.lengths import Counts
from fambav.reduction.reducer import Grid, Indices, Reducer
from fambav.short_repr import short_repr

_SIDES = 64  # rows and columns of patches up to which a larger image is looked for


def check_counts(
    counts: Counts,
    info: BackboneInfo,
    reducer: Reducer,
    class_policy: str | None = None,
    *,
    given: tuple[str, object],
) -> None:
    """Refuse tokens to remove that a method cannot, whatever the images.

    Args:
        counts: At each layer.
        info: The model.
        reducer: The method.
        class_policy: As of `make_schedule`.
        given: Name and value of the setting that a refusal is about.

    Raises:
        ValueError: As `make_schedule`.
    """
    own = reducer.class_policy if info.cls_index else "exact"
    policy = own if class_policy is None else class_policy
    refused = _misfit(counts, info, reducer, policy)
    if refused is None:
        return
    number, length, limit = refused
    layer, (name, value) = f"{info.prefix}{number}", given
    active = [count for count in counts if count]
    even = len(active) > 1 and len(set(active)) == 1 and name != "fusion_plan" and not info.prefix
    even = even or name == "fusion_token"  # one number for all layers
    most = _most(counts, info, reducer, policy) if even else limit
    where = "" if even else f" at layer {layer}"
    kept = "without touching a class token" if info.cls_index else "at once"
    raise ValueError(
        f"{name} is {short_repr(value)}, expected at most {most}{where};"
        f" layer {layer} has {info.tokens} - {info.tokens - length} = {length} tokens, of which"
        f" {reducer.name} can remove {limit} {kept}"
        f"{'' if most else _ways_out(counts, info, reducer, policy)}"
    )


def _ways_out(counts: Counts, info: BackboneInfo, reducer: Reducer, policy: str) -> str:
    """Name the first layer from which one token each would fit, and the patches for all."""
    layers = [number for number, count in enumerate(counts) if count]
    if len(layers) < 2:
        return ""
    ways = [f"{len(layers)} layers cannot share {info.tokens} tokens"]
    ones = ((n, tuple(int(c > 0 and k >= n) for k, c in enumerate(counts))) for n in layers)
    later = next((n + 1 for n, own in ones if _fits(own, info, reducer, policy)), None)
    if later is not None:
        ways.append(f"one at each fits from layer {info.prefix}{later} on")
    larger = (own for own in _larger(info) if _fits(counts, own, reducer, policy))
    grid = next((own.grid for own in larger), None)
    if grid is not None:
        wanted, there = (" x ".join(map(str, own)) for own in (grid, info.grid))
        what = ("maps", "cells") if info.prefix else ("images", "patches")
        ways.append(f"all fit from {what[0]} of {wanted} {what[1]} on, this one has {there}")
    return f"; {', '.join(ways)}"


def _larger(info: BackboneInfo) -> Iterator[BackboneInfo]:
    """The model on images of more and more patches."""
    grid, last = cast("Grid | None", info.grid), info.tokens - 1
    if grid is None:  # tokens of no image
        return
    height, width = grid
    for more in range(1, _SIDES):
        grid = height + more, width + more
        patches = grid[0] * grid[1]
        tokens = patches + len(info.cls_index)
        at = {0: 0, last: tokens - 1}  # of a class token; the others are in the middle
        cls_index = tuple(at.get(index, patches // 2) for index in info.cls_index)
        stage = info.stage._replace(grid=grid, tokens=tokens)
        yield info._replace(stages=(stage,), cls_index=cls_index)


def _fits(counts: Counts, info: BackboneInfo, reducer: Reducer, policy: str) -> bool:
    try:
        return _misfit(counts, info, reducer, policy) is None
    except ValueError:  # not on its grid
        return False


def _misfit(
    counts: Counts,
    info: BackboneInfo,
    reducer: Reducer,
    class_policy: str = "exact",
) -> tuple[int, int, int] | None:
    """Return the first layer, from 1, that cannot remove its tokens, its length and its limit."""
    length, grid, possible = info.tokens, cast("Grid | None", info.grid), {info.cls_index}
    for number, count in enumerate(counts, start=1):
        if count:
            limit = min(reducer.limit(length, cls_index) for cls_index in possible)
            if count > limit:
                return number, length, limit
            try:
                grid = reducer.grid_after(grid, count)
            except ValueError as error:
                raise ValueError(
                    f"tokens removed at layer {info.prefix}{number} are {count}, expected {error}"
                ) from None
            after = (_cls_index_after(reducer, length, p, count, class_policy) for p in possible)
            possible, length = set().union(*after), length - count
    return None


def _cls_index_after(
    reducer: Reducer, length: int, cls_index: Indices, count: int, class_policy: str
) -> set[Indices]:
    """Return where class tokens may be after `count` of `length` tokens went."""
    kept = length - count
    if class_policy == "exact":
        return reducer.cls_index_after(length, cls_index, count)
    if class_policy == "middle":
        return {((kept - 1) // 2,) * len(cls_index)}
    return {tuple(index * kept // length for index in cls_index)}


def _most(counts: Counts, info: BackboneInfo, reducer: Reducer, policy: str) -> int:
    """Return the largest count that fits at all the layers where `counts` removes tokens."""
    for most in range(min(info.tokens, max(counts) - 1), 0, -1):
        if _fits(tuple(most if count else 0 for count in counts), info, reducer, policy):
            return most
    return 0
