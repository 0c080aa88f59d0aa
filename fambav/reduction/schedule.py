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

A model of stages has layers stage.layer, each from 1: r:8@2.1-2.4, keep:0.7@3.1,3.5, 2.1:9,3.2:12.
A stage starts with all of its tokens again, so that shares and lengths are of its own; a form
without layers is about every layer of every stage.

Source: the last four are the strategies of Shen et al., "Famba-V", arXiv:2409.09808, section 3; the
ramp from r (1 - slope) to r (1 + slope) is that of Bolya et al., "Token Merging", arXiv:2210.09461,
section 3.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from fambav.arguments import LARGEST, MOST_LAYERS, instance, is_whole, known_name, refusal, whole
from fambav.layers import BackboneInfo
from fambav.reduction.lengths import Counts, Schedule
from fambav.reduction.limits import check_counts
from fambav.reduction.reducer import Reducer
from fambav.registry import SCHEDULES, STRATEGIES, STRATEGY_ALIASES, nearest

_LAYER = r"\d+(?:\.\d+)?"
_RANGE = re.compile(rf"({_LAYER})(?:-({_LAYER})(?:/([1-9]\d*))?)?")
_PAIR = rf"\s*{_LAYER}\s*:\s*\d+\s*"
_PAIRS = re.compile(rf"{_PAIR}(,{_PAIR})*")
_LONG = re.compile(r"(?<![\d.])\d{10}")  # not behind a point
NAME, PUBLISHED = "reduction_schedule", "published"


class Layers(NamedTuple):
    """The layers that a schedule is about.

    Attributes:
        depths: Layers of each stage.
        starts: Tokens before the first layer of each stage, class tokens included.
        classes: Class tokens.
        staged: Whether a layer is named stage.layer.
    """

    depths: tuple[int, ...]
    starts: tuple[int, ...] = (0,)
    classes: int = 0
    staged: bool = False

    @classmethod
    def of(cls, info: BackboneInfo) -> Layers:
        """Return those of a model."""
        depths, starts = zip(*((stage.depth, stage.tokens) for stage in info.stages), strict=True)
        return cls(depths, starts, len(info.cls_index), info.staged)

    @property
    def depth(self) -> int:
        """Layers of all stages."""
        return sum(self.depths)

    @property
    def expected(self) -> str:
        """What names of layers there are."""
        last = f"{len(self.depths)}.{self.depths[-1]}"
        return f"layers from 1.1 to {last}" if self.staged else f"layers from 1 to {self.depth}"

    @property
    def _first(self) -> int:
        """The largest first number of a name."""
        return len(self.depths) if self.staged else self.depth

    def number(self, name: str) -> int:
        """Return the number of a layer, from 1 over all stages.

        Raises:
            ValueError: If there is none of that name, with what was expected as its text.
        """
        stage, point, layer = name.partition(".")
        if bool(point) != self.staged or not 1 <= int(stage) <= self._first:
            raise ValueError(self.expected)
        if not self.staged:
            return int(stage)
        own = self.depths[int(stage) - 1]
        if not 1 <= int(layer) <= own:
            raise ValueError(f"layers from {stage}.1 to {stage}.{own} in stage {stage}")
        return sum(self.depths[: int(stage) - 1]) + int(layer)

    def fresh(self, numbers: Sequence[int]) -> list[int | None]:
        """Return what its stage starts with for the first layer of each stage, for others None."""
        ends, starts, last = list(accumulate(self.depths)), list[int | None](), -1
        for number in numbers:
            stage = bisect_left(ends, number)
            starts.append(None if stage == last else self.starts[stage])
            last = stage
        return starts


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
    check_counts(counts, info, reducer, class_policy, given=given or (NAME, text))
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
    _parse(plan, Layers((depth,)), name="fusion_plan")
    return plan


def plan(strategy: str, *, depth: int, count: int = 0, layer: int | None = None) -> Counts:
    """Return the tokens that a Famba-V strategy removes at each layer; see `from_fusion`."""
    text = from_fusion(strategy, depth=depth, layer=layer, token=count)
    return (0,) * depth if text is None else _parse(text, Layers((depth,)))


def write_schedule(counts: Sequence[int], names: Sequence[str] = ()) -> str:
    """Write tokens removed at each layer as pairs such as "6:9,8:12"; empty if none are.

    Args:
        counts: Of each layer.
        names: Of each layer; by default 1, 2, ...

    Raises:
        ValueError: If counts are no whole numbers of at least 0.
    """
    if not isinstance(counts, Sequence) or not all(is_whole(n) and n >= 0 for n in counts):
        raise refusal("counts", counts, "a whole number of at least 0 for each layer")
    pairs = zip(names or range(1, len(counts) + 1), counts, strict=True)
    return ",".join(f"{name}:{count}" for name, count in pairs if count)


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
    return _parse(text, Layers.of(info), name=name)


def _parse(text: str, layers: Layers, *, name: str = NAME) -> Counts:
    if not isinstance(text, str):
        raise refusal(name, text, f"one of {SCHEDULES}")
    try:
        found = _read(text, layers)
        if any(count < 0 for count in found.values()):
            raise ValueError("lengths that do not grow")
        if not any(found.values()):
            raise ValueError("one that removes tokens")
    except ValueError as expected:
        raise refusal(name, text, str(expected)) from None
    return tuple(found.get(number, 0) for number in range(1, layers.depth + 1))


def _read(text: str, layers: Layers) -> dict[int, int]:
    """Return counts by layer; whatever is wrong is raised as the text of what was expected."""
    if _LONG.search(text):
        raise ValueError("numbers of at most 9 digits")
    kind, colon, rest = text.partition(":")
    if _PAIRS.fullmatch(text):
        return _pairs(text, layers)
    kind = STRATEGY_ALIASES.get(kind, kind)
    if kind in STRATEGIES[1:]:
        if layers.staged and kind != "all":
            raise ValueError(f"one that names layers, such as r:5@2.1; {kind} counts in one stage")
        return _strategy(kind, rest, layers.depth)
    numbers, at, where = rest.partition("@")
    pattern = r"-?\d+(\.\d*)?|-?\.\d+" if kind in ("keep", "ramp") else r"\d+"
    words = [word.strip() for word in numbers.split(",")]
    known = colon and kind in _READERS and not (at and kind == "list")
    if not known or not all(re.fullmatch(pattern, word) for word in words):
        hint = nearest(kind, (*STRATEGIES[1:], *_READERS))
        did = f"; {hint}" if hint.startswith("did") and kind not in _READERS else ""
        raise ValueError(f"one of {SCHEDULES}{did}")
    chosen = _chosen(where, layers) if at else range(1, layers.depth + 1)
    values = [float(word) for word in words]
    counts = _READERS[kind](values, layers.fresh(chosen), layers.classes)
    return dict(zip(chosen, counts, strict=True))


def _pairs(text: str, layers: Layers) -> dict[int, int]:
    pairs = [[word.strip() for word in part.split(":")] for part in text.split(",")]
    try:
        found = {layers.number(layer): int(count) for layer, count in pairs}
    except ValueError as error:
        raise ValueError(f"each layer once, {error}".replace("layers ", "")) from None
    if len(found) < len(pairs):
        raise ValueError(f"each layer once, {layers.expected}".replace("layers ", ""))
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


# What readers get beside the values: for each layer, `Layers.fresh`; and the class tokens.


def _constant(values: list[float], fresh: list[int | None], classes: int) -> Iterable[int]:
    (count,) = _exactly(values, 1, "one number of tokens, such as r:5")
    return [int(count)] * len(fresh)


def _ramp(values: list[float], fresh: list[int | None], classes: int) -> Iterable[int]:
    mean, slope = _exactly(values, 2, "two numbers, such as ramp:16,-1")
    if mean != int(mean) or not -1 <= slope <= 1:
        raise ValueError("a whole number of tokens and a slope from -1 to 1")
    first, steps = int(mean * (1 - slope)), max(len(fresh) - 1, 1)
    return [int(first + 2 * (mean - first) * n / steps) for n in range(len(fresh))]


def _list(values: list[float], fresh: list[int | None], classes: int) -> Iterable[int]:
    if len(values) > len(fresh):
        raise ValueError(f"at most {len(fresh)} numbers, one for each layer")
    return [int(count) for count in values] + [0] * (len(fresh) - len(values))


def _keep(values: list[float], fresh: list[int | None], classes: int) -> Iterable[int]:
    if len(values) > 1:
        values = _exactly(values, len(fresh), "one share, or one for each layer")
    patches, counts = 0, []
    for share, start in zip(values * (len(fresh) // len(values)), fresh, strict=True):
        patches = patches if start is None else start - classes
        if not 0 < share <= 1:
            raise ValueError("shares of more than 0 and at most 1")
        kept = math.ceil(round(patches * share, 6))
        counts.append(patches - kept)
        patches = kept
    return counts


def _tokens(values: list[float], fresh: list[int | None], classes: int) -> Iterable[int]:
    lengths = _exactly(values, len(fresh), "as many lengths as layers")
    before = zip(fresh, [0.0, *lengths], strict=False)  # one more than there are layers
    return [
        int((own if start is None else start) - kept)
        for (start, own), kept in zip(before, lengths, strict=True)
    ]


_READERS = {"r": _constant, "ramp": _ramp, "list": _list, "keep": _keep, "tokens": _tokens}


def _chosen(text: str, known: Layers) -> list[int]:
    """Read "3-23/2" and "5,10,15", or "2.1-2.4" and "3.1,3.5"."""
    layers: list[int] = []
    for word in text.split(","):
        found = _RANGE.fullmatch(word.strip())
        if found is None:
            like = "2.1,3.5 or 2.1-2.4" if known.staged else "5,10,15 or 3-23/2"
            raise ValueError(f"layers such as {like}")
        first, last = known.number(found[1]), known.number(found[2] or found[1])
        step = int(found[3] or 1)
        if first > last:
            raise ValueError(known.expected)
        layers += range(first, last + 1, step)
    if any(b <= a for a, b in pairwise(layers)):
        raise ValueError("ascending layers, none twice")
    return layers
