"""What each reduction method costs where it acts, in layers of the model.

mixer before, asked to tell  ->  choose  ->  merge or drop  ->  mixer behind, across the gaps
(telling)                        (reduce, with its backward)    (aging)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fambav.bench.report import Report, Row, settings
from fambav.bench.scan import BATCH, positive, training_dtype
from fambav.ecosystem import timm
from fambav.engine.runtime import Precision, numerics
from fambav.engine.timing import Run, Times, interleave, ratio, spread, with_replays
from fambav.layers import Ask, BackboneInfo, Signals, Tokens
from fambav.models import Backbone
from fambav.reduction import Reducer, Reduction, make_reducer, make_reduction, no_reduction
from fambav.registry import METHODS, family_of, nearest

SHARE = 0.05  # of the patches, where no count is given
PLAIN = "plain"  # what all methods are compared with
EAGER, REPLAYED = "eager", "replayed"

Part = tuple[str, str]  # method and part, such as "choose"
Timed = dict[tuple[Any, ...], Times]  # by method, launch and part


def reduction(
    *,
    model: str = "vim_tiny",
    methods: Sequence[str] = METHODS,
    count: int | None = None,
    batch: int | None = None,
    rounds: int = 9,
    warmup: int = 2,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Report:
    """Measure one reduction by each method, in the middle of a new model on random images.

    Args:
        model: One of ours.
        methods: Names of methods, each as it is by default.
        count: Tokens that go; by default 5% of the patches, or the number nearest to that after
            which a method that needs a grid has one.
        batch: Images; by default 128 on a GPU and 8 on a CPU.
        rounds: How often each candidate is timed, at least 1.
        warmup: Rounds before those.
        device: Where.
        dtype: Of the forward pass; by default that of training there.

    Returns:
        A row for every method that the model can carry out:
            choose_ms       choosing tokens, without gradients
            reduce_ms       all of the reduction, choosing included, forward and backward
            layer_ms        a plain layer at the length before, norm and mixer, forward and backward
            share_of_layer  reduce over layer
            telling         a mixer that is asked what the method reads over a plain one
            aging           a mixer that scans across the gaps over one at its length that does not
            net             reduce and what telling adds, in layers; a token that went saves one
                            part in `length` of a layer at each layer behind
        Those of a PlainMamba have its param_order: "raster" as in released weights, "permuted" for
        methods that scan across gaps, which need that; the plain layer is of the same order.
        On a GPU these are times of replays; where a part of a method cannot be replayed, all of its
        row is eager.

    Raises:
        ValueError: If a method is unknown, a number is too small, or the model can carry out none.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch, **({} if count is None else {"count": count}))
    with numerics(deterministic=False, matmul_precision="high"):
        benches = _benches(methods, model, batch, device, dtype)
        rows, skipped = _rows(benches, count, device, rounds=rounds, warmup=warmup)
    first = benches[0][0]
    told = dict(model=model, batch=batch, length=first.info.tokens, layer=first.layer + 1)
    return Report(
        title="one reduction by each method, against a plain layer",
        settings=settings(device, dtype, **told, rounds=rounds),
        rows=tuple(rows[name] for name in dict.fromkeys(methods) if name in rows),
        skipped=skipped,
    )


def _benches(
    methods: Sequence[str], model: str, batch: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[_Bench, list[str]]]:
    """Build the model, and once more in another form for methods that need it; each with its own.

    Those are the methods that scan across gaps, if released weights do not allow that.
    """
    for name in methods:
        if name not in METHODS:
            hint = nearest(name, METHODS)
            raise ValueError(f"method is {name!r}, expected a known name; {hint}")
    bench = _Bench(model, batch, device, dtype)
    names, refused = list(dict.fromkeys(methods)), bench.info.unaligned is not None
    aligned = [name for name in names if refused and make_reducer(name).scan == "aligned"]
    benches = [(bench, [name for name in names if name not in aligned])]
    if aligned:
        permuted = _Bench(model, batch, device, dtype, param_order="permuted")
        benches.append((permuted, aligned))
    return benches


def _rows(
    benches: Sequence[tuple[_Bench, list[str]]],
    count: int | None,
    device: torch.device,
    **how: Any,
) -> tuple[dict[str, Row], dict[str, str]]:
    """Return the rows of methods, and why something cannot be measured or replayed."""
    rows, skipped = dict[str, Row](), dict[str, str]()
    for bench, methods in benches:
        able, absent = _able(bench.info, bench.layer, methods, count)
        skipped |= absent
        if not able:
            continue
        runs = bench.plain()
        for name, found in able.items():
            runs |= bench.runs(name, found)
        timed, launches, refused = _launched(runs, device)
        skipped |= refused
        times = interleave(timed, **how, device=device)
        rows |= {n: _row(n, found, bench.form, launches[n], times) for n, found in able.items()}
    if not rows:
        raise ValueError(next(iter(skipped.values()), "method is empty, expected one or more"))
    return rows, skipped


def _able(
    info: BackboneInfo, layer: int, methods: Sequence[str], count: int | None
) -> tuple[dict[str, Reduction], dict[str, str]]:
    """Set up what a model can carry out at a layer, from 0, and say why it cannot do the rest."""
    found, skipped = dict[str, Reduction](), dict[str, str]()
    for name in methods:
        try:
            number = nearest_count(make_reducer(name), info) if count is None else count
            found[name] = make_reduction(info, name, f"r:{number}@{layer + 1}")
        except ValueError as error:
            skipped[name] = str(error)
    return found, skipped


def nearest_count(method: Reducer, info: BackboneInfo) -> int:
    """Return the number of tokens nearest to 5% of the patches that a method can take from a grid.

    Args:
        method: The method; one that needs a grid may not be able to take any number.
        info: The model.
    """
    patches = info.tokens - len(info.cls_index)
    wanted = max(1, round(SHARE * patches))
    for count in sorted(range(1, patches), key=lambda n: (abs(n - wanted), n)):
        try:
            method.shape(info.grid, count)
        except ValueError:
            continue
        return count
    return wanted


class _Met(NamedTuple):
    """What goes through a model at one reduction.

    Attributes:
        tokens: What the reduction receives.
        before: What the mixer before it receives.
        behind: What the first mixer behind it receives.
    """

    tokens: Tokens
    before: tuple[Any, ...]
    behind: tuple[Any, ...]


class _Bench:
    """A model and images, whose tokens are caught in the middle.

    Attributes:
        layer: The layer that reduces, from 0.
        info: Of the model.
        form: What a row tells of how the model is built.
    """

    def __init__(
        self, model: str, batch: int, device: torch.device, dtype: torch.dtype, **form: Any
    ) -> None:
        torch.manual_seed(0)
        net = cast(Backbone, timm.create_model(model, num_classes=0, **form)).to(device)
        formed = "param_order" in family_of(model).arguments
        self.form = {"param_order": str(net.param_order)} if formed else {}
        self._net, self._blocks = net, list[Any](net.layers)
        self.info: BackboneInfo = net.info
        self.layer = self.info.depth // 2
        self._images = torch.randn(batch, net.patch_embed.in_chans, *net.img_size).to(device)
        self._precision = Precision(device, None if dtype == torch.float32 else dtype)

    def plain(self) -> dict[Part, Run]:
        """Return what runs a layer that nothing is done at, and its mixer."""
        block = self._blocks[self.layer]
        (tokens, *_), hidden = self._caught(no_reduction(self.info), block, block.mixer)
        tokens, streams = _leaves(tokens)

        def forward() -> Iterable[Tensor | None]:
            return _streams(block(tokens))

        layer = self._both(forward, [*streams, *block.parameters()])
        return {(PLAIN, "layer"): layer, self._mixer_part(hidden): self._mixer(block.mixer, hidden)}

    def runs(self, name: str, reduction: Reduction) -> dict[Part, Run]:
        """Return what runs the parts of a method, and the plain mixers beside them."""
        met = self._meet(reduction)
        method = cast(Reducer, reduction.method)
        left, count = met.tokens.living(), reduction.schedule.removed
        tokens, leaves = _leaves(met.tokens)

        def choose() -> object:
            with torch.no_grad(), self._precision.autocast():
                return method.select(left, count)

        def forward() -> Iterable[Tensor | None]:
            fewer = reduction(tokens, layer=self.layer)
            return (*_streams(fewer), fewer.gap)

        found = {(name, "choose"): choose, (name, "reduce"): self._both(forward, leaves)}
        after = reduction.hook == "after"
        mixers = [block.mixer for block in self._blocks]
        if reduction.needs:
            mixer = mixers[self.layer - 1 + after]
            found[name, "telling"] = self._mixer(mixer, met.before, delta=reduction.gap == "cached")
        if len(met.behind) > 1 and cast(Ask, met.behind[1]).gap is not None:
            mixer, (hidden, asked) = mixers[self.layer + after], met.behind
            found[name, "aging"] = self._mixer(mixer, met.behind)
            # Scattered over a grid, they must be looked up there without aging, too.
            plain = (hidden, Ask(asked.tokens)) if self.info.needs_positions else (hidden,)
            found[self._mixer_part(plain)] = self._mixer(mixer, plain)
        return found

    def _meet(self, reduction: Reduction) -> _Met:
        after = reduction.hook == "after"
        mixers = (self._blocks[self.layer + step + after].mixer for step in (-1, 0))
        (tokens, *_), before, behind = self._caught(reduction, reduction, *mixers)
        return _Met(tokens, before, behind)

    def _caught(self, reduction: Reduction, *modules: nn.Module) -> list[tuple[Any, ...]]:
        """Send the images through the model; return what each of these modules is called with."""
        caught = dict[nn.Module, tuple[Any, ...]]()

        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            caught[module] = given

        self._net.reduction = reduction
        with ExitStack() as hooks, torch.no_grad(), self._precision.autocast():
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(look).remove)
            self._net(self._images)
        self._net.reduction = no_reduction(self.info)
        return [caught[module] for module in modules]

    def _mixer_part(self, given: tuple[Any, ...]) -> Part:
        return PLAIN, _mixer_name(given[0].shape[1])

    def _mixer(self, mixer: nn.Module, given: tuple[Any, ...], *, delta: bool = False) -> Run:
        """Return what runs a mixer; `delta` for a gradient that comes through the step sizes."""
        hidden, *ask = given
        hidden = _leaf(hidden)
        leaves = [hidden, *mixer.parameters()]
        if not ask:
            return self._both(lambda: (mixer(hidden),), leaves)
        asked = cast(Ask, ask[0])
        if asked.tokens.gap is not None:
            gap = _leaf(asked.tokens.gap)
            leaves.append(gap)
            asked = asked._replace(tokens=asked.tokens._replace(gap=gap))

        def forward() -> Iterable[Tensor | None]:
            x, signals = mixer(hidden, asked)
            return x, cast(Signals, signals).delta if delta else None

        return self._both(forward, leaves)

    def _both(
        self, forward: Callable[[], Iterable[Tensor | None]], leaves: Sequence[Tensor]
    ) -> Run:
        """Return what runs forward and backward, from gradients that are drawn once."""

        def outputs() -> list[Tensor]:
            with self._precision.autocast():
                return [x for x in forward() if x is not None and x.requires_grad]

        grads = [torch.randn_like(x) for x in outputs()]

        def run() -> object:
            return torch.autograd.grad(outputs(), leaves, grads, allow_unused=True)

        return run


def _mixer_name(length: int) -> str:
    return f"mixer of {length} tokens"


def _streams(tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
    return tokens.x, tokens.residual


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _leaves(tokens: Tokens) -> tuple[Tokens, list[Tensor]]:
    """Return tokens whose streams and signals are leaves, and these leaves."""
    found: list[Tensor] = []

    def leaf(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        found.append(_leaf(x))
        return found[-1]

    signals = tokens.signals
    if signals is not None:
        signals = Signals(signals.order, *map(leaf, signals[1:]))
    x, residual = map(leaf, _streams(tokens))
    return tokens._replace(x=cast(Tensor, x), residual=residual, signals=signals), found


def _launched(
    runs: dict[Part, Run], device: torch.device
) -> tuple[dict[tuple[Any, ...], Run], dict[str, str], dict[str, str]]:
    """Replay what can be replayed.

    Returns:
        What is timed, by method, launch and part, with what methods are compared with launched in
        the same way; how each method is launched; why something cannot be replayed.
    """
    made, refused = with_replays(runs, device)
    shared = all((name, REPLAYED, part) in made for name, part in runs if name == PLAIN)
    launches = {
        method: REPLAYED
        if shared and all((name, REPLAYED, part) in made for name, part in runs if name == method)
        else EAGER
        for method, _ in runs
        if method != PLAIN
    }
    used = {*launches.items(), *((PLAIN, launch) for launch in launches.values())}
    return {key: run for key, run in made.items() if key[:2] in used}, launches, refused


def _row(name: str, found: Reduction, form: Mapping[str, str], launch: str, times: Timed) -> Row:
    start = found.info.tokens
    own = {part: ms for (method, _, part), ms in times.items() if method == name}
    plain = {part: ms for (*whose, part), ms in times.items() if whose == [PLAIN, launch]}
    layer, mixer = plain["layer"], plain[_mixer_name(start)]
    reduce, telling = own["reduce"], own.get("telling")
    net = reduce
    if telling is not None:
        net = [a + b - c for a, b, c in zip(reduce, telling, mixer, strict=True)]
    return {
        "method": name,
        "hook": found.hook,
        "scan": found.scan,
        **form,
        "launch": launch,
        "removed": found.schedule.removed,
        "choose_ms": spread(own["choose"])["median_ms"],
        "reduce_ms": spread(reduce)["median_ms"],
        "layer_ms": spread(layer)["median_ms"],
        "share_of_layer": ratio(reduce, layer),
        "telling": ratio(telling, mixer),
        "aging": ratio(own.get("aging"), plain.get(_mixer_name(found.schedule.final))),
        "net": ratio(net, layer),
    }
