"""Where tokens are removed, and how many: how it is written, read, and checked against a method.

    r:5                     5 tokens at every layer
    r:5@3-23/2              5 at layers 3, 5, ..., 23; also r:5@5,10,15
    ramp:16,-1              from 32 at the first layer in equal steps to 0 at the last
    list:7,7,0,7            so many at layers 1, 2, 3 and 4, none at the others
    6:9,8:12                9 at layer 6 and 12 at layer 8, none at the others
    keep:0.8@5,10           this share of the patches stays at layers 5 and 10
    tokens:157,125@10,20    so many tokens are kept behind layers 10 and 20
    all:7  interleaved:7    7 at every layer, and at layers 2, 4, 6, ...
    lower:9:7  upper:9:7    7 at layers 1 .. 9, and at layers 9 .. depth

Layers count from 1, as in the papers; layer 1 is nearest the image.  Tokens go before the mixer of
the same layer, unless the method removes them after it.

Source: the last four are the strategies of Shen et al., "Famba-V", arXiv:2409.09808, section 3; the
ramp from r (1 - slope) to r (1 + slope) is that of Bolya et al., "Token Merging", arXiv:2210.09461,
section 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, cast

from fambav.arguments import LARGEST, MOST_LAYERS, instance, is_whole, known_name, refusal, whole
from fambav.layers import BackboneInfo
from fambav.reduction.reducer import Grid, Indices, Reducer
from fambav.registry import SCHEDULES, STRATEGIES, STRATEGY_ALIASES, nearest
from fambav.short_repr import short_repr

Counts = tuple[int, ...]

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:/([1-9]\d*))?)?")
_PAIRS = re.compile(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*")
_LONG = re.compile(r"(?<![\d.])\d{10}")  # not behind a point
NAME, PUBLISHED = "reduction_schedule", "published"


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
    counts: Counts
    lengths: tuple[int, ...]
    after: bool = False

    @classmethod
    def of(cls, start: int, counts: Counts, *, after: bool = False) -> Schedule:
        """Work out the lengths."""
        kept = [start - sum(counts[: number + 1]) for number in range(len(counts))]
        seen = [n + count for n, count in zip(kept, counts, strict=True)] if after else kept
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
        """Return the schedule as text; neighbouring layers that remove nothing share a line."""
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


def make_schedule(
    text: str,
    info: BackboneInfo,
    reducer: Reducer,
    *,
    hook: str | None = None,
    class_policy: str | None = None,
    given: tuple[str, object] | None = None,
) -> Schedule:
    """Read a schedule and check that a method can carry it out, whatever the images.

    Args:
        text: As above, or "published" for that of the method's paper.
        info: The model.
        reducer: The method, which knows how many tokens can go at once, and where.
        hook: Where in a block tokens go; the method's own by default.
        class_policy: Where class tokens go; as the method says by default.
        given: Name and value of the setting that a refusal is about, if text is made from it.

    Raises:
        ValueError: If the text has another form, the paper has none for such a model, or a layer
            cannot remove its tokens without touching a class token, or lacks the grid of patches
            that the method needs.
    """
    instance("reducer", reducer, Reducer, "one of `make_reducer`")
    name = given[0] if given else NAME
    if text == PUBLISHED:
        text = _published(info, reducer, name)
    counts = parse_schedule(text, info, name=name)
    own = reducer.class_policy if info.cls_index else "exact"
    refused = _misfit(counts, info, reducer, own if class_policy is None else class_policy)
    if refused is not None:
        layer, length, limit = refused
        value = given[1] if given else text
        most = f"{limit} at layer {layer}"
        if name == "fusion_token":
            most = str(_most(counts, info, reducer))
        raise ValueError(
            f"{name} is {short_repr(value)}, expected at most {most}; "
            f"layer {layer} has {info.tokens} - {info.tokens - length} = {length} tokens, of which"
            f" {reducer.name} can remove {limit} without touching a class token"
        )
    return Schedule.of(
        info.tokens, counts, after=(reducer.hook if hook is None else hook) == "after"
    )


def _published(info: BackboneInfo, reducer: Reducer, name: str) -> str:
    text = reducer.published(info)
    if text is None:
        raise ValueError(
            f"{name} is {PUBLISHED!r}, expected another such as r:5; {reducer.name} has none for"
            f" {info.family} of width {info.width} and depth {info.depth}"
        )
    return text


def from_fusion(
    strategy: str = "none",
    *,
    depth: int,
    layer: int | None = None,
    token: int = 0,
    plan: str | None = None,
) -> str | None:
    """Write `--fusion-strategy`, `-layer`, `-token` and `-plan` as a schedule.

    Args:
        strategy: "none" (alias no), "all", "interleaved" (alias alternate), "lower" or "upper".
        depth: Number of layers.
        layer: Last fused layer of lower, first fused layer of upper, 1 .. depth; None elsewhere.
        token: Tokens removed at each fused layer, the paper's r; 0 for none, else at least 1.
        plan: Pairs layer:count such as "6:9,8:12", instead of a strategy, layer and token count.

    Returns:
        The schedule; None for no fusion.

    Raises:
        ValueError: If an argument is unknown, out of range, missing or not wanted, or if nothing
            would be removed under a strategy other than none.
    """
    _check_fusion(strategy, depth, layer, token)
    name = STRATEGY_ALIASES.get(strategy, strategy)
    if plan is not None:
        if name == "none" and not token and layer is None:
            return _fusion_plan(plan, depth)
        raise refusal("fusion_plan", plan, "none beside a strategy, layer or token count")
    if name not in ("lower", "upper"):
        if layer is not None:
            raise refusal("fusion_layer", layer, f"none with strategy {name}")
    elif layer is None or not 1 <= layer <= depth:
        raise refusal("fusion_layer", layer, f"1 to {depth} with strategy {name}")
    if token != 0 if name == "none" else token < 1:
        wanted = "0" if name == "none" else "at least 1"
        raise refusal("fusion_token", token, f"{wanted} with strategy {name}")
    if name == "interleaved" and depth < 2:
        raise refusal("fusion_strategy", strategy, f"one that removes tokens at depth {depth}")
    if name == "none":
        return None
    return f"{name}:{token}" if layer is None else f"{name}:{layer}:{token}"


def _check_fusion(strategy: Any, depth: Any, layer: Any, token: Any) -> None:
    """Refuse what is of another type than `from_fusion` says."""
    known_name("fusion_strategy", strategy, (*STRATEGIES, *STRATEGY_ALIASES))
    whole("depth", depth, least=1, most=MOST_LAYERS)
    for name, number in (("fusion_layer", 0 if layer is None else layer), ("fusion_token", token)):
        if not is_whole(number) or abs(number) > LARGEST:
            raise refusal(name, number, f"a whole number of at most {LARGEST}")


def _fusion_plan(plan: str, depth: int) -> str:
    if not isinstance(plan, str) or not _PAIRS.fullmatch(plan):
        raise refusal("fusion_plan", plan, "layer:count pairs such as 6:9,8:9")
    _parse(plan, depth=depth, name="fusion_plan")
    return plan


def plan(strategy: str, *, depth: int, count: int = 0, layer: int | None = None) -> Counts:
    """Return the tokens that a Famba-V strategy removes at each layer; see `from_fusion`."""
    text = from_fusion(strategy, depth=depth, layer=layer, token=count)
    return (0,) * depth if text is None else _parse(text, depth=depth)


def write_schedule(counts: Sequence[int]) -> str:
    """Write tokens removed at each layer as pairs such as "6:9,8:12"; empty if none are.

    Raises:
        ValueError: If counts are no whole numbers of at least 0.
    """
    if not isinstance(counts, Sequence) or not all(is_whole(n) and n >= 0 for n in counts):
        raise refusal("counts", counts, "a whole number of at least 0 for each layer")
    return ",".join(f"{layer}:{count}" for layer, count in enumerate(counts, start=1) if count)


def parse_schedule(text: str, info: BackboneInfo, *, name: str = NAME) -> Counts:
    """Read a schedule.

    Args:
        text: As above.
        info: The model that it is for.
        name: Of the setting that a refusal is about.

    Returns:
        Tokens removed at each layer; the first is layer 1's.

    Raises:
        ValueError: If the text has another form, a layer is not there, layers do not ascend, a
            share is not more than 0 and at most 1, or nothing would be removed.
    """
    instance("info", info, BackboneInfo, "the `info` of a model")
    classes = len(info.cls_index)
    return _parse(text, depth=info.depth, start=info.tokens, classes=classes, name=name)


def _parse(text: str, *, depth: int, start: int = 0, classes: int = 0, name: str = NAME) -> Counts:
    if not isinstance(text, str):
        raise refusal(name, text, f"one of {SCHEDULES}")
    try:
        found = _read(text, depth, start, classes)
        if any(count < 0 for count in found.values()):
            raise ValueError("lengths that do not grow")
        if not any(found.values()):
            raise ValueError("one that removes tokens")
    except ValueError as expected:
        raise refusal(name, text, str(expected)) from None
    return tuple(found.get(number, 0) for number in range(1, depth + 1))


def _read(text: str, depth: int, start: int, classes: int) -> dict[int, int]:
    """Return counts by layer; whatever is wrong is raised as the text of what was expected."""
    if _LONG.search(text):
        raise ValueError("numbers of at most 9 digits")
    kind, colon, rest = text.partition(":")
    if _PAIRS.fullmatch(text):
        return _pairs(text, depth)
    kind = STRATEGY_ALIASES.get(kind, kind)
    if kind in STRATEGIES[1:]:
        return _strategy(kind, rest, depth)
    numbers, at, where = rest.partition("@")
    pattern = r"-?\d+(\.\d*)?|-?\.\d+" if kind in ("keep", "ramp") else r"\d+"
    words = [word.strip() for word in numbers.split(",")]
    known = colon and kind in _READERS and not (at and kind == "list")
    if not known or not all(re.fullmatch(pattern, word) for word in words):
        hint = nearest(kind, (*STRATEGIES[1:], *_READERS))
        did = f"; {hint}" if hint.startswith("did") and kind not in _READERS else ""
        raise ValueError(f"one of {SCHEDULES}{did}")
    layers = _layers(where, depth) if at else range(1, depth + 1)
    counts = _READERS[kind]([float(word) for word in words], len(layers), start, classes)
    return dict(zip(layers, counts, strict=True))


def _pairs(text: str, depth: int) -> dict[int, int]:
    pairs = [part.split(":") for part in text.split(",")]
    found = {int(layer): int(count) for layer, count in pairs}
    if len(found) < len(pairs) or not all(1 <= layer <= depth for layer in found):
        raise ValueError(f"each layer once, from 1 to {depth}")
    return found


def _strategy(kind: str, numbers: str, depth: int) -> dict[int, int]:
    """Return counts by layer of a Famba-V strategy: the only place that knows what upper means."""
    form = r"([1-9]\d*):([1-9]\d*)" if kind in ("lower", "upper") else r"()([1-9]\d*)"
    found = re.fullmatch(form, numbers)
    if found is None:
        raise ValueError(f"{kind}:{'layer:' if kind in ('lower', 'upper') else ''}tokens")
    layer, count = int(found[1] or 1), int(found[2])
    if layer > depth:
        raise ValueError(f"a layer from 1 to {depth}")
    layers = {
        "all": range(1, depth + 1),
        "interleaved": range(2, depth + 1, 2),
        "lower": range(1, layer + 1),
        "upper": range(layer, depth + 1),
    }[kind]
    return dict.fromkeys(layers, count)


def _exactly(values: list[float], length: int, expected: str) -> list[float]:
    if len(values) != length:
        raise ValueError(expected)
    return values


def _constant(values: list[float], layers: int, start: int, classes: int) -> Iterable[int]:
    (count,) = _exactly(values, 1, "one number of tokens, such as r:5")
    return [int(count)] * layers


def _ramp(values: list[float], layers: int, start: int, classes: int) -> Iterable[int]:
    mean, slope = _exactly(values, 2, "two numbers, such as ramp:16,-1")
    if mean != int(mean) or not -1 <= slope <= 1:
        raise ValueError("a whole number of tokens and a slope from -1 to 1")
    first, steps = int(mean * (1 - slope)), max(layers - 1, 1)
    return [int(first + 2 * (mean - first) * n / steps) for n in range(layers)]


def _list(values: list[float], layers: int, start: int, classes: int) -> Iterable[int]:
    if len(values) > layers:
        raise ValueError(f"at most {layers} numbers, one for each layer")
    return [int(count) for count in values] + [0] * (layers - len(values))


def _keep(values: list[float], layers: int, start: int, classes: int) -> Iterable[int]:
    if len(values) > 1:
        values = _exactly(values, layers, "one share, or one for each layer")
    patches, counts = start - classes, []
    for share in values * (layers // len(values)):
        if not 0 < share <= 1:
            raise ValueError("shares of more than 0 and at most 1")
        kept = math.ceil(round(patches * share, 6))
        counts.append(patches - kept)
        patches = kept
    return counts


def _tokens(values: list[float], layers: int, start: int, classes: int) -> Iterable[int]:
    lengths = _exactly(values, layers, "as many lengths as layers")
    return [int(a - b) for a, b in pairwise((start, *lengths))]


_READERS = {"r": _constant, "ramp": _ramp, "list": _list, "keep": _keep, "tokens": _tokens}


def _layers(text: str, depth: int) -> list[int]:
    """Read "3-23/2" and "5,10,15"."""
    layers: list[int] = []
    for word in text.split(","):
        found = _RANGE.fullmatch(word.strip())
        if found is None:
            raise ValueError("layers such as 5,10,15 or 3-23/2")
        first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
        if not 1 <= first <= last <= depth:
            raise ValueError(f"layers from 1 to {depth}")
        layers += range(first, last + 1, step)
    if any(b <= a for a, b in pairwise(layers)):
        raise ValueError("ascending layers, none twice")
    return layers


def _misfit(
    counts: Counts, info: BackboneInfo, reducer: Reducer, class_policy: str = "exact"
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
                    f"tokens removed at layer {number} are {count}, expected {error}"
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


def _most(counts: Counts, info: BackboneInfo, reducer: Reducer) -> int:
    """Return the largest count that fits at all the layers where `counts` removes tokens."""
    for most in range(min(info.tokens, max(counts) - 1), 0, -1):
        if _misfit(tuple(most if count else 0 for count in counts), info, reducer) is None:
            return most
    return 0
