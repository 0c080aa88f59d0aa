"""Where tokens are removed, and how many: the cross-layer strategies.

    strategy, r -> tokens to remove at each layer -> tokens that each layer's mixer sees

Layers count from 1 here, as in the paper; layer 1 is nearest the image.  Tokens go before the
mixer of the same layer, unless the method removes them after it.

Source: Shen et al., "Famba-V", arXiv:2409.09808, section 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from fambav.layers import BackboneInfo
from fambav.reduction.reducer import Places, Reducer
from fambav.registry import STRATEGIES, STRATEGY_ALIASES, nearest


@dataclass(frozen=True)
class Schedule:
    """How many tokens there are at each layer.

    Attributes:
        start: Tokens before the first layer, class tokens included.
        counts: Tokens removed at each layer.
        lengths: Tokens that each layer's mixer sees.
        after: Whether a layer's tokens go after its mixer instead of before it.
    """

    start: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    after: bool = False

    @classmethod
    def of(cls, start: int, counts: tuple[int, ...], *, after: bool = False) -> Schedule:
        """Work out the lengths."""
        left = [start - sum(counts[: number + 1]) for number in range(len(counts))]
        seen = [n + count for n, count in zip(left, counts, strict=True)] if after else left
        return cls(start, counts, tuple(seen), after)

    @property
    def final(self) -> int:
        """Tokens behind the last layer."""
        return self.start - self.removed

    @property
    def removed(self) -> int:
        """Tokens removed by all layers together."""
        return sum(self.counts)

    @property
    def share(self) -> float:
        """Tokens summed over the mixers, as a share of what they are without removal, 0 to 1."""
        return sum(self.lengths) / (len(self.lengths) * self.start)

    def table(self) -> str:
        """Return the plan as text; neighbouring layers that remove nothing share a line."""
        lines = [f"{'layer':>7}  {'tokens in':>9}  {'removed':>7}  {'tokens out':>10}"]
        layers = enumerate(zip(self.counts, self.lengths, strict=True), start=1)
        for (count, seen), run in groupby(layers, key=lambda item: item[1]):
            first, *rest = (number for number, _ in run)
            name = f"{first}-{rest[-1]}" if rest else f"{first}"
            out = seen - count if self.after else seen
            lines.append(f"{name:>7}  {out + count:>9}  {count or '-':>7}  {out:>10}")
        point = ", after the mixer of their layer" if self.after else ""
        return "\n".join(
            (
                *lines,
                f"total removed: {self.removed} of {self.start} tokens{point}",
                f"share of token-layers left: {100 * self.share:.1f}% "
                f"({sum(self.lengths)} of {len(self.lengths) * self.start})",
            )
        )


def plan(strategy: str, *, depth: int, count: int = 0, layer: int | None = None) -> tuple[int, ...]:
    """Tokens to remove at each layer.  The only place that knows what "upper" means.

    Args:
        strategy: One of
            none         nowhere (alias no)
            all          at every layer
            interleaved  at layers 2, 4, 6, ... (alias alternate)
            lower        at layers 1 .. layer
            upper        at layers layer .. depth
        depth: Number of layers.
        count: Tokens removed at each chosen layer, the paper's r; 0 for none, else at least 1.
        layer: Last fused layer of lower, first fused layer of upper, 1 .. depth; None elsewhere.

    Returns:
        `depth` counts, 0 where nothing is removed; the first is layer 1's.

    Raises:
        ValueError: If an argument is unknown, out of range, missing or not wanted, or if nothing
            would be removed under a strategy other than none.
    """
    name = STRATEGY_ALIASES.get(strategy, strategy)
    if name not in STRATEGIES:
        hint = nearest(strategy, (*STRATEGIES, *STRATEGY_ALIASES))
        raise ValueError(f"fusion_strategy is {strategy!r}, expected a known name; {hint}")
    _check_layer(name, depth, layer)
    if count != 0 if name == "none" else count < 1:
        wanted = "0" if name == "none" else "at least 1"
        raise ValueError(f"fusion_token is {count}, expected {wanted} with strategy {name}")
    chosen = {
        "none": range(0),
        "all": range(1, depth + 1),
        "interleaved": range(2, depth + 1, 2),
        "lower": range(1, (layer or 0) + 1),
        "upper": range(layer or 1, depth + 1),
    }[name]
    if name != "none" and not chosen:
        raise ValueError(
            f"fusion_strategy is {strategy!r}, expected one that removes tokens at depth {depth}"
        )
    return tuple(count if number in chosen else 0 for number in range(1, depth + 1))


def parse_plan(text: str, depth: int) -> tuple[int, ...]:
    """Read a free plan such as "6:9,8:12": 9 tokens at layer 6, 12 at layer 8, else none.

    Args:
        text: Pairs layer:count, separated by commas; layers count from 1.
        depth: Number of layers.

    Returns:
        `depth` counts; the first is layer 1's.

    Raises:
        ValueError: If the text has another form, a layer is outside 1 .. depth or named twice, or
            nothing would be removed.
    """
    counts: dict[int, int] = {}
    for part in text.split(","):
        pair = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        if pair is None:
            raise ValueError(f"fusion_plan is {text!r}, expected layer:count pairs such as 6:9,8:9")
        number, count = map(int, pair.groups())
        if not 1 <= number <= depth or number in counts:
            raise ValueError(
                f"fusion_plan is {text!r}, expected each layer once, from 1 to {depth}"
            )
        counts[number] = count
    if not any(counts.values()):
        raise ValueError(f"fusion_plan is {text!r}, expected one that removes tokens")
    return tuple(counts.get(number, 0) for number in range(1, depth + 1))


def check(
    counts: tuple[int, ...], info: BackboneInfo, reducer: Reducer, *, policy: str = "exact"
) -> Misfit | None:
    """Find out whether a plan can be carried out, whatever the images.

    Args:
        counts: Tokens to remove at each layer.
        info: The model.
        reducer: The method, which says how many tokens can go at once.
        policy: Where class tokens go.

    Returns:
        The first layer that cannot remove its tokens without touching a class token; None if all
        can.

    Raises:
        ValueError: If the method needs a grid of patches that a layer would not have.
    """
    length, grid, possible = info.tokens, info.grid, {info.cls_index}
    for number, count in enumerate(counts, start=1):
        if count:
            limit = min(reducer.limit(length, places) for places in possible)
            if count > limit:
                return Misfit(number, length, limit)
            grid = _shaped(reducer, grid, count, number)
            possible = set().union(
                *(_places(reducer, length, places, count, policy) for places in possible)
            )
            length -= count
    return None


class Misfit(NamedTuple):
    """Where a plan cannot be carried out.

    Attributes:
        layer: The layer, from 1.
        length: Tokens there.
        limit: How many of them can go.
    """

    layer: int
    length: int
    limit: int


def _shaped(reducer: Reducer, grid: Any, count: int, number: int) -> Any:
    try:
        return reducer.shape(grid, count)
    except ValueError as error:
        raise ValueError(
            f"tokens removed at layer {number} are {count}, expected {error}"
        ) from None


def _places(reducer: Reducer, length: int, places: Places, count: int, policy: str) -> set[Places]:
    """Return where class tokens may be after `count` of `length` tokens went."""
    kept = length - count
    if policy == "exact":
        return reducer.moved(length, places, count)
    if policy == "middle":
        return {((kept - 1) // 2,) * len(places)}
    return {tuple(place * kept // length for place in places)}


def fusion(
    strategy: str = "none",
    *,
    info: BackboneInfo,
    reducer: Reducer,
    count: int = 0,
    layer: int | None = None,
    plan: str | None = None,
) -> Schedule:
    """Make the plan of a Famba-V strategy and check that it can be carried out.

    Args:
        strategy: As in `plan`; "none" if there is a free plan.
        info: The model.
        reducer: Says how many tokens can go at once, and where.
        count: Tokens removed at each chosen layer.
        layer: First or last fused layer, as in `plan`.
        plan: A free plan, as in `parse_plan`, instead of strategy, count and layer.

    Returns:
        The checked schedule.

    Raises:
        ValueError: If an argument is wrong, or a layer would have to remove more tokens than the
            reducer can remove in every case without touching a class token.
    """
    counts = _counts(strategy, depth=info.depth, count=count, layer=layer, text=plan)
    over = check(counts, info, reducer)
    if over is not None:
        wrong = f"fusion_plan is {plan!r}, expected at most {over.limit} at layer {over.layer}"
        if plan is None:
            wrong = f"fusion_token is {count}, expected at most {_most(counts, info, reducer)}"
        raise ValueError(f"{wrong}; {explained(over, info, reducer)}")
    return Schedule.of(info.tokens, counts, after=reducer.hook == "after")


def explained(over: Misfit, info: BackboneInfo, reducer: Reducer) -> str:
    """Say why a layer cannot remove its tokens."""
    return (
        f"layer {over.layer} has {info.tokens} - {info.tokens - over.length} = {over.length} "
        f"tokens, of which {reducer.name} can remove {over.limit} without touching a class token"
    )


def _check_layer(strategy: str, depth: int, layer: int | None) -> None:
    """Refuse a layer that is missing, not wanted or not there."""
    if strategy not in ("lower", "upper"):
        if layer is not None:
            raise ValueError(f"fusion_layer is {layer}, expected none with strategy {strategy}")
    elif layer is None or not 1 <= layer <= depth:
        raise ValueError(f"fusion_layer is {layer}, expected 1 to {depth} with strategy {strategy}")


def _counts(
    strategy: str, *, depth: int, count: int, layer: int | None, text: str | None
) -> tuple[int, ...]:
    """Tokens to remove at each layer, by strategy or by free plan."""
    if text is None:
        return plan(strategy, depth=depth, count=count, layer=layer)
    if STRATEGY_ALIASES.get(strategy, strategy) != "none" or count or layer is not None:
        raise ValueError(
            f"fusion_plan is {text!r}, expected none beside a strategy, layer or token count"
        )
    return parse_plan(text, depth)


def _most(counts: tuple[int, ...], info: BackboneInfo, reducer: Reducer) -> int:
    """Return the largest count that fits at all the layers where `counts` removes tokens."""
    for most in range(min(info.tokens, max(counts) - 1), 0, -1):
        fewer = tuple(most if count else 0 for count in counts)
        if check(fewer, info, reducer) is None:
            return most
    return 0
