"""What each reduction method costs where it acts, in layers of the model.

mixer before, with intermediates  ->  choose  ->  merge or drop  ->  mixer behind, across the gaps
(intermediates)                       (reduce, with its backward)    (aging)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from fambav.bench.candidates import EAGER, REPLAYED
from fambav.bench.operations import BATCH
from fambav.bench.report import Report, Row, positive, settings, training_dtype
from fambav.bench.timing import Run, Times, interleave, peak_mib, ratio, spread, with_replays
from fambav.engine.precision import Precision, determinism_settings
from fambav.layers import BackboneInfo, Hooks, Intermediates, Tokens
from fambav.layers.cells import Cells
from fambav.layers.hierarchy import changed_hooks
from fambav.models import Backbone, Hierarchical
from fambav.reduction import (
    Reducer,
    Reduction,
    StagedReduction,
    make_reducer,
    make_reduction,
    make_staged_reduction,
    no_reduction,
)
from fambav.registry import METHODS, family_of, nearest
from fambav.timm_compat import timm

SHARE = 0.05  # of the patches, where no count is given
TITLE = "one reduction by each method, against a plain layer"
PLAIN = "plain"  # what all methods are compared with

Part = tuple[str, str]  # method and part, such as "choose"
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a module is called with


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
        count: Tokens that go; 5% of the patches by default, or nearly, where a grid must stay.

    Returns:
        A row for every method that the model can carry out; of stages, see `_of_stages`:
            choose_ms       choosing tokens, without gradients
            reduce_ms       all of the reduction, choosing included, forward and backward
            layer_ms        a plain layer at the length before, norm and mixer, forward and backward
            share_of_layer  reduce over layer
            intermediates   a mixer that returns those which the method reads over a plain one
            aging           a mixer that scans across the gaps over one at its length that does not
            lookup          a mixer that finds its tokens in the grid by position over a plain one
            net             reduce and what intermediates add, in layers; a token that went saves
                            one part in `length` of a layer at each layer behind
        Those of a PlainMamba have its param_order: "raster" as in released weights, "permuted" for
        methods that scan across gaps, which need that; the plain layer is of the same order.
        On a GPU times are of replays; where a part cannot be replayed, its row is eager.

    Raises:
        ValueError: If a method is unknown, a number is too small, or the model can carry out none.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch, **({} if count is None else {"count": count}))
    names = _known(methods)
    rows, skipped = dict[str, Row](), dict[str, str]()
    if family_of(model).staged:
        return _of_stages(model, names, count, batch, device, dtype, (rounds, warmup))
    with determinism_settings(deterministic=False, matmul_precision="high"):
        bench = _Bench(model, batch, device, dtype)
        benches = {bench: names}
        # Released weights may not allow to scan across gaps: once more in a form that does.
        aligned = [n for n in names if bench.info.unaligned and make_reducer(n).scan == "aligned"]
        if aligned:
            benches[bench] = [name for name in names if name not in aligned]
            benches[_Bench(model, batch, device, dtype, param_order="permuted")] = aligned
        for one, able in benches.items():
            found, absent = one.rows(able, count, device, rounds=rounds, warmup=warmup)
            rows, skipped = rows | found, skipped | absent
    if not rows:
        raise ValueError(next(iter(skipped.values()), "method is empty, expected one or more"))
    sizes = dict(model=model, batch=batch, length=bench.info.tokens, layer=bench.layer + 1)
    about = settings(device, dtype, **sizes, rounds=rounds)
    ordered = [rows[n] for n in names if n in rows]
    return Report(title=TITLE, settings=about, rows=ordered, skipped=skipped)


def _known(methods: Sequence[str]) -> list[str]:
    """Return each name once; refuse one that no method has."""
    for name in methods:
        if name not in METHODS:
            hint = nearest(name, METHODS)
            raise ValueError(f"method is {name!r}, expected a known name; {hint}")
    return list(dict.fromkeys(methods))


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
            method.grid_after(info.grid, count)
        except ValueError:
            continue
        return count
    return wanted


class _Bench:
    """A model and images, whose tokens are caught in the middle.

    Attributes:
        layer: The layer that reduces, from 0.
        info: Of the model.
    """

    def __init__(
        self, model: str, batch: int, device: torch.device, dtype: torch.dtype, **form: Any
    ) -> None:
        torch.manual_seed(0)
        net = timm.create_model(model, num_classes=0, **form).to(device)
        if not isinstance(net, Backbone):
            raise ValueError(f"model is {model!r}, expected one whose tokens can be reduced")
        formed = "param_order" in family_of(model).arguments
        self._form = {"param_order": str(net.param_order)} if formed else {}
        self._net, self._blocks = net, list[Any](net.layers)
        self.info: BackboneInfo = net.info
        self.layer = self.info.depth // 2
        self._images = torch.randn(batch, net.patch_embed.in_chans, *net.img_size).to(device)
        self._precision = Precision(device, None if dtype == torch.float32 else dtype)

    def rows(
        self, methods: Sequence[str], count: int | None, device: torch.device, **how: Any
    ) -> tuple[dict[str, Row], dict[str, str]]:
        """Return the rows of methods, and why something cannot be measured or replayed."""
        found, skipped = dict[str, Reduction](), dict[str, str]()
        for name in methods:
            try:
                number = nearest_count(make_reducer(name), self.info) if count is None else count
                found[name] = make_reduction(self.info, name, f"r:{number}@{self.layer + 1}")
            except ValueError as error:
                skipped[name] = str(error)
        if not found:
            return {}, skipped
        runs = self._plain()
        for name, one in found.items():
            runs |= self._runs(name, one)
        made, refused = with_replays(runs, device)
        plain = {name for name, _ in runs if name == PLAIN}
        launches = {
            name: REPLAYED
            if all((n, REPLAYED, part) in made for n, part in runs if n in {name, *plain})
            else EAGER
            for name in found
        }
        used = {*launches.items(), *((PLAIN, launch) for launch in launches.values())}
        timed = {key: run for key, run in made.items() if key[:2] in used}
        times = interleave(timed, **how, device=device)
        rows = {name: self._row(name, one, launches[name], times) for name, one in found.items()}
        return rows, skipped | refused

    def _row(
        self, name: str, found: Reduction, launch: str, times: Mapping[tuple[Any, ...], Times]
    ) -> Row:
        own = {part: ms for (method, _, part), ms in times.items() if method == name}
        plain = {part: ms for (*whose, part), ms in times.items() if whose == [PLAIN, launch]}
        layer, mixer = plain["layer"], plain[_mixer_name(found.info.tokens)]
        net = reduce = own["reduce"]
        returning = own.get("intermediates")
        if returning is not None:
            net = [a + b - c for a, b, c in zip(reduce, returning, mixer, strict=True)]
        return {
            "method": name,
            "hook": found.hook,
            "scan": found.scan,
            **self._form,
            "launch": launch,
            "removed": found.schedule.removed,
            "choose_ms": spread(own["choose"])["median_ms"],
            "reduce_ms": spread(reduce)["median_ms"],
            "layer_ms": spread(layer)["median_ms"],
            "share_of_layer": ratio(reduce, layer),
            "intermediates": ratio(returning, mixer),
            "lookup": ratio(own.get("lookup"), mixer),
            "aging": ratio(own.get("aging"), plain.get(_mixer_name(found.schedule.final))),
            "net": ratio(net, layer),
        }

    def _plain(self) -> dict[Part, Run]:
        """Return what runs a layer that nothing is done at, and its mixer."""
        block = self._blocks[self.layer]
        ((tokens, *_), _), call = self._caught(no_reduction(self.info), block, block.mixer)
        tokens, leaves = token_leaves(tokens)
        layer = self._both(lambda: streams(block(tokens)), [*leaves, *block.parameters()])
        return {(PLAIN, "layer"): layer, self._mixer_part(call): self._mixer(block.mixer, call)}

    def _runs(self, name: str, reduction: Reduction) -> dict[Part, Run]:
        """Return what runs the parts of a method, and the plain mixers beside them."""
        after = reduction.hook == "after"
        mixers = [self._blocks[self.layer + step + after].mixer for step in (-1, 0)]
        ((met, *_), _), before, behind = self._caught(reduction, reduction, *mixers)
        method = cast(Reducer, reduction.method)
        kept, count = met.kept(), reduction.schedule.removed
        tokens, leaves = token_leaves(met)

        def choose() -> object:
            with torch.no_grad(), self._precision.autocast():
                return method.select(kept, count)

        def forward() -> Iterable[Tensor | None]:
            fewer = reduction(tokens, layer=self.layer)
            return (*streams(fewer), fewer.skipped_dt)

        found = {(name, "choose"): choose, (name, "reduce"): self._both(forward, leaves)}
        if reduction.needs:
            delta = reduction.gap_policy == "cached"
            found[name, "intermediates"] = self._mixer(mixers[0], before, delta=delta)
        (hidden, *given), options = behind
        if options.get("gap_policy") is not None:
            found[name, "aging"] = self._mixer(mixers[1], behind)
            # At positions on a grid, they have to be placed there without aging, too.
            plain: Call = ((hidden, *given) if self.info.needs_positions else (hidden,), {})
            found[self._mixer_part(plain)] = self._mixer(mixers[1], plain)
        elif given and cast(Tokens, given[0]).grid is None:
            call: Call = ((before[0][0], met._replace(grid=None)), {})
            found[name, "lookup"] = self._mixer(mixers[1], call)
        return found

    def _caught(self, reduction: Reduction, *modules: nn.Module) -> list[Call]:
        """Send the images through the model; return what each of these modules is called with."""
        caught = dict[nn.Module, Call]()

        def note(module: nn.Module, *call: Any) -> None:
            caught[module] = cast(Call, call)

        self._net.reduction = reduction
        with ExitStack() as hooks, torch.no_grad(), self._precision.autocast():
            for module in modules:
                hook = module.register_forward_pre_hook(note, with_kwargs=True)
                hooks.callback(hook.remove)
            self._net(self._images)
        self._net.reduction = no_reduction(self.info)
        return [caught[module] for module in modules]

    def _mixer_part(self, call: Call) -> Part:
        return PLAIN, _mixer_name(call[0][0].shape[1])

    def _mixer(self, mixer: nn.Module, call: Call, *, delta: bool = False) -> Run:
        """Return what runs a mixer; `delta` for a gradient that comes through the step sizes."""
        (hidden, *given), options = call
        hidden = _leaf(hidden)
        leaves = [hidden, *mixer.parameters()]
        if not given:
            return self._both(lambda: (mixer(hidden),), leaves)
        tokens = cast(Tokens, given[0])
        if tokens.skipped_dt is not None:
            leaves.append(_leaf(tokens.skipped_dt))
            tokens = tokens._replace(skipped_dt=leaves[-1])

        def forward() -> Iterable[Tensor | None]:
            x, found = mixer(hidden, tokens, **options)
            return x, cast(Intermediates, found).delta if delta else None

        return self._both(forward, leaves)

    def _both(
        self, forward: Callable[[], Iterable[Tensor | None]], leaves: Sequence[Tensor]
    ) -> Run:
        return _forward_backward(forward, leaves, self._precision)


class _StagedBench:
    """A model of stages and images, whose cells are caught in the middle of a stage."""

    def __init__(self, model: str, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        if not family_of(model).reducible:
            raise ValueError(f"model is {model!r}, expected one whose tokens can be reduced")
        torch.manual_seed(0)
        net = cast(Hierarchical, timm.create_model(model, num_classes=0).to(device))
        self._net, self.info = net, net.info
        self._images = torch.randn(batch, net.in_chans, *net.img_size).to(device)
        self._precision = Precision(device, None if dtype == torch.float32 else dtype)

    def made(self, stage: int, name: str, count: int | None) -> StagedReduction:
        """Return a reduction in the middle of a stage, from 0.

        Raises:
            ValueError: If the method cannot act there.
        """
        own = self.info.of_stage(stage)
        number = nearest_count(make_reducer(name), own) if count is None else count
        layer = own.depth // 2 + 1
        return make_staged_reduction(self.info, name, f"{own.prefix}{layer}:{number}")

    def runs(self, stage: int, reduction: StagedReduction) -> dict[str, Run]:
        """Return what runs the parts of a reduction and the layer beside it."""
        own, layer = reduction.stage(stage), self.info.stages[stage].depth // 2
        method, count = cast(Reducer, own.method), own.schedule.removed
        met, x = self._caught(stage, layer, reduction)
        block = self._net.stages[stage][layer]
        tokens, leaves = token_leaves(met)
        with torch.no_grad(), self._precision.autocast():
            fewer = own(met, layer=layer)
        rows, dropped = _leaf(fewer.x), torch.zeros_like(met.x) if fewer.dropped else None

        def choose() -> object:
            with torch.no_grad(), self._precision.autocast():
                return method.select(met, count)

        def both(forward: Callable[[], Iterable[Tensor | None]], given: Sequence[Tensor]) -> Run:
            return _forward_backward(forward, given, self._precision)

        return {
            "choose": choose,
            "reduce": both(lambda: streams(own(tokens, layer=layer)), leaves),
            "restore": both(lambda: [Cells(fewer, dropped).whole(rows)], [rows]),
            "layer": both(lambda: [block(x)], [x, *block.parameters()]),
        }

    def _caught(self, stage: int, layer: int, reduction: StagedReduction) -> tuple[Tokens, Tensor]:
        """Return the cells that a reduction is called with, and the first map of its stage."""
        caught, hook = list[Tokens](), reduction.stage(stage).hook
        maps = list[Tensor]()

        def note(at: int, block: int, hooks: Hooks) -> Hooks:
            if (at, block) != (stage, layer):
                return hooks
            act: Callable[[Tokens], Tokens] = getattr(hooks, hook)

            def noting(tokens: Tokens) -> Tokens:
                caught.append(tokens)
                return act(tokens)

            return hooks._replace(**cast(dict[str, Any], {hook: noting}))

        def enter(_: nn.Module, given: tuple[Any, ...]) -> None:
            maps.append(given[0])

        handle = self._net.stages[stage].register_forward_pre_hook(enter)
        self._net.reduction = reduction
        watched = changed_hooks(self._net.stages, note)
        self._net.eval()  # batch norm has no variance of one image whose last map is one cell
        with torch.no_grad(), self._precision.autocast(), watched:
            self._net(self._images)
        self._net.train()
        handle.remove()
        return caught[0], _leaf(maps[0])


def _of_stages(
    model: str,
    methods: Sequence[str],
    count: int | None,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    how: tuple[int, int],
) -> Report:
    """Measure one reduction by each method in the middle layer of each stage, of no other.

    Columns are those of `reduction`, and
        restore_ms              giving every cell its row again at the end of the stage, forward and
                                backward
        reduce_mib, layer_mib   peak memory of both beyond what they are given
    """
    rows, skipped = list[Row](), dict[str, str]()
    with determinism_settings(deterministic=False, matmul_precision="high"):
        bench = _StagedBench(model, batch, device, dtype)
        for stage, own in enumerate(bench.info.stages):
            able = dict[str, StagedReduction]()
            if own.tokens == 1:
                skipped[f"stage {stage + 1}"] = "it has a single token"
                continue
            for name in methods:
                try:
                    able[name] = bench.made(stage, name, count)
                except ValueError as error:
                    skipped[f"{name} in stage {stage + 1}"] = str(error)
            runs = {
                (f"{name} in stage {stage + 1}", part): run
                for name, one in able.items()
                for part, run in bench.runs(stage, one).items()
            }
            made, refused = with_replays(runs, device)
            times = interleave(made, rounds=how[0], warmup=how[1], device=device) if made else {}
            skipped |= refused
            for name, one in able.items():
                label = f"{name} in stage {stage + 1}"
                mine = {part: run for (which, part), run in runs.items() if which == label}
                layer = f"{stage + 1}.{own.depth // 2 + 1}"
                about = {"layer": layer, "tokens": own.tokens, "removed": one.schedule.removed}
                rows.append({"method": name, **about, **_staged_row(label, mine, times, device)})
    if not rows:
        raise ValueError(next(iter(skipped.values()), "method is empty, expected one or more"))
    sizes = settings(device, dtype, model=model, batch=batch, rounds=how[0])
    return Report(title=TITLE, settings=sizes, rows=rows, skipped=skipped)


def _staged_row(
    label: str,
    runs: Mapping[str, Run],
    times: Mapping[tuple[Any, ...], Times],
    device: torch.device,
) -> Row:
    """Return the times and memory of a reduction; eager ones unless all parts were replayed."""
    replayed = all((label, REPLAYED, part) in times for part in runs)
    launch = REPLAYED if replayed else EAGER
    own = {part: times[label, launch, part] for part in runs}
    return {
        "launch": launch,
        **{f"{part}_ms": spread(ms)["median_ms"] for part, ms in own.items()},
        "share_of_layer": ratio(own["reduce"], own["layer"]),
        "reduce_mib": peak_mib(runs["reduce"], device),
        "layer_mib": peak_mib(runs["layer"], device),
    }


def _forward_backward(
    forward: Callable[[], Iterable[Tensor | None]], leaves: Sequence[Tensor], precision: Precision
) -> Run:
    """Return what runs forward and backward, from gradients that are drawn once."""

    def outputs() -> list[Tensor]:
        with precision.autocast():
            return [x for x in forward() if x is not None and x.requires_grad]

    grads = [torch.randn_like(x) for x in outputs()]

    def run() -> object:
        return torch.autograd.grad(outputs(), leaves, grads, allow_unused=True)

    return run


def _mixer_name(length: int) -> str:
    return f"mixer of {length} tokens"


def streams(tokens: Tokens) -> list[Tensor]:
    """Return what goes through a model."""
    return [stream for stream in (tokens.x, tokens.residual) if stream is not None]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def token_leaves(tokens: Tokens) -> tuple[Tokens, list[Tensor]]:
    """Return tokens whose streams and intermediates are leaves, and these leaves."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        leaves.append(_leaf(x))
        return leaves[-1]

    found = tokens.intermediates
    if found is not None:
        found = Intermediates(found.order, *map(leaf, found[1:]))
    x, residual = map(leaf, (tokens.x, tokens.residual))
    return tokens._replace(x=cast(Tensor, x), residual=residual, intermediates=found), leaves
