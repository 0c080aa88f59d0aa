"""Where the time of a run goes: by layer, and by kind of operation.

By layer, the device is waited for at every boundary of a module, and what passed is put down to the
module that was at work; a backward pass tells its boundaries by gradients that arrive.  By
operation, torch's profiler tells.  Both slow a run down, so both give shares and no times.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from fambav.bench.report import Row
from fambav.bench.timing import Run, settle
from fambav.models import Backbone
from fambav.ops.kernels import NUMBA, TRITON
from fambav.reduction import Reduction

REST = "rest"
WHOLE, REDUCTION = "fambav whole run", "fambav reduction"  # ranges of our own
# What a name tells, in the order asked.  The first three are made of other operations, which are
# theirs; the gate is the scan's last step.
MADE_OF = {
    "pooling": r"fambav::pool|_pool_(for|back)ward|\b_Mean(Backward)?$",
    "matching": rf"fambav::match|_best_partner|_choose_kernel|^{REDUCTION}$",
    "norm": r"norm(?!al)",
}
ALONE = {
    "conv": r"conv|fprop|dgrad|wgrad",
    "scan": r"scan|\bgate_|_gate_",
    "attention": r"attention|flash|fmha|(?<!log)(?<!log_)softmax",
    "linear": r"\b_?(baddb|add|b)?mm(_|$|backward)|linear|matmul|gemm|gemv|cutlass|nvjet",
}
GROUPS = ("scan", "conv", "norm", "matching", "pooling", "linear", "attention", REST)
KERNELS = [f"{kind}_{way}" for kind in ("scan", "conv", "gate") for way in ("forward", "backward")]

# What is profiled: does all of it once; the model in it; what changes the weights, or None.
Watched = tuple[Run, nn.Module, torch.optim.Optimizer | None]
Event = tuple[int, int, str]  # from, to in nanoseconds, and the name of an operation


def profile(
    watched: Mapping[str, Watched], *, rounds: int, device: torch.device
) -> dict[str, list[Row]]:
    """Return two tables of shares: by layer, and by operation.

    Args:
        watched: What to profile, by name.
        rounds: How often each is run for either, at least 1.
        device: Where.

    Returns:
        By layer a row for every part and a column for every name; forward and backward pass of a
        layer are together.  By operation a row for every name and a column for every group: on a
        CPU of the time of the run, on a GPU of the time of its kernels.  Shares add up to 1.
    """
    layers = {n: by_layer(*one, rounds=rounds, device=device) for n, one in watched.items()}
    parts = dict.fromkeys(part for shares in layers.values() for part in shares if part != REST)
    return {
        "share of the time by layer": [
            {"part": part, **{name: shares.get(part) for name, shares in layers.items()}}
            for part in (*parts, REST)
        ],
        "share of the time by operation": [
            {"run": name, **by_operation(run, net, rounds=rounds, device=device)}
            for name, (run, net, _) in watched.items()
        ],
    }


def by_layer(
    run: Run,
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    rounds: int,
    device: torch.device,
) -> dict[str, float]:
    """Return the share of each part of a model, from the least that it took in any round.

    What disturbs a part only ever adds to it, and seldom in every round.
    """
    found = []
    for _ in range(rounds):
        clock = _Clock(device)
        with _boundaries(clock, net, optimizer):
            run()
            clock.turn(REST)
        found.append(clock.spent)
    return _shares({part: min(spent[part] for spent in found) for part in found[0]})


def _shares(spent: Mapping[str, float]) -> dict[str, float]:
    whole = sum(spent.values())
    return {name: own / whole for name, own in spent.items()}


class _Clock:
    """Seconds of each part, by turns; it starts with the rest."""

    def __init__(self, device: torch.device) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._device, self.now = device, REST
        settle(device)
        self._since = time.perf_counter()

    def turn(self, part: str) -> None:
        """Put what passed down to the part at work; another one is at work from now on."""
        settle(self._device)
        now = time.perf_counter()
        self.spent[self.now] += now - self._since
        self.now, self._since = part, now


@contextmanager
def _boundaries(
    clock: _Clock, net: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[None]:
    """Tell the clock when a part begins and ends, forward and backward."""
    outer: list[str] = []  # the parts that those at work are in

    def before(_: nn.Module, given: object, *, part: str) -> None:
        outer.append(clock.now)
        clock.turn(part)
        if outer[-1] != REST:  # the gradient of its input is the other part's again
            _at_gradient(given, partial(clock.turn, outer[-1]))

    def after(_: nn.Module, given: object, result: object, *, part: str) -> None:
        clock.turn(outer.pop())
        _at_gradient(result, partial(clock.turn, part))

    with ExitStack() as hooks:
        for part, module in parts(net).items():
            enter, leave = partial(before, part=part), partial(after, part=part)
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        if optimizer is not None:
            begin = optimizer.register_step_pre_hook(lambda *_: clock.turn("optimizer"))
            end = optimizer.register_step_post_hook(lambda *_: clock.turn(REST))
            hooks.callback(begin.remove)
            hooks.callback(end.remove)
        yield


def parts(net: nn.Module) -> dict[str, nn.Module]:
    """Name the parts of a model.

    Of one of ours, the patches, the layers from 1 and the head, and the reduction, which is part of
    a layer and counts for itself.  Of others, the children that have weights, and in the place of a
    list of some what is in it; what is in the longest is a layer.
    """
    if isinstance(net, Backbone):
        layers = {f"layer {n}": one for n, one in enumerate(net.layers, start=1)}
        ends = {"reduction": net.reduction, "head": net.head}
        return {"patches": net.patch_embed, **layers, **ends}
    lists = {
        name: child
        for name, child in net.named_children()
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1
    }
    longest = max(lists, key=lambda name: len(lists[name]), default="")
    found: dict[str, nn.Module] = {}
    for name, child in net.named_children():
        if name in lists:
            kind = "layer" if name == longest else name
            found |= {f"{kind} {n}": one for n, one in enumerate(lists[name], start=1)}
        elif any(True for _ in child.parameters()):
            found[name] = child
    return found


def _at_gradient(values: object, call: Callable[[], None]) -> None:
    """Call when the gradient of the first tensor in nested tuples arrives."""
    tensor = next(_tensors(values), None)
    if tensor is not None and tensor.requires_grad:
        tensor.register_hook(lambda _: call())


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def by_operation(
    run: Run, net: nn.Module, *, rounds: int, device: torch.device
) -> dict[str, float]:
    """Return the share of each group of operations, on a CPU from the least that it took."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with _ranges(net), torch_profile(activities=activities) as profiler:
        for _ in range(rounds):
            with record_function(WHOLE):
                run()
        settle(device)
    # Its own tables would take seconds for some thousands.
    events = profiler.profiler.kineto_results.events()
    runs = [kernel_times(events)] if gpu else operation_times(_of_one_thread(events))
    return _shares({name: min(spent[name] for spent in runs) for name in GROUPS})


def kernel_times(events: Iterable[Any]) -> Counter[str]:
    """Add the times of a GPU's kernels up by group; ranges that somebody opened are none."""
    spent: Counter[str] = Counter()
    for event in events:
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            spent[group([event.name()])] += event.duration_ns()
    return spent


def _of_one_thread(events: Iterable[Any]) -> list[Event]:
    """Return what the CPU did in the thread of the runs."""
    here = [e for e in events if e.device_type() == DeviceType.CPU]
    thread = next(e.start_thread_id() for e in here if e.name() == WHOLE)
    return [
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name())
        for e in here
        if e.start_thread_id() == thread
    ]


def operation_times(events: Sequence[Event]) -> list[Counter[str]]:
    """Add the times of all inside of each run, each without what it calls, up by group."""
    runs: list[Counter[str]] = []
    opened: list[tuple[int, Groups]] = []  # ranges that have not ended, from outside
    for start, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while opened and start >= opened[-1][0]:
            opened.pop()
        if not opened:
            if name != WHOLE:
                continue
            runs.append(Counter())
        outer = opened[-1][1] if opened else (None, None)
        own = _within(outer, name)
        runs[-1][_group(own)] += end - start
        if opened:
            runs[-1][_group(outer)] -= end - start
        opened.append((end, own))
    return runs


Groups = tuple[str | None, str | None]  # one that owns what it is made of, and one that does not


def group(names: Sequence[str]) -> str:
    """Return the group of an operation.

    Args:
        names: Its name, then those of what it is called by, from within.
    """
    found: Groups = (None, None)
    for name in reversed(names):
        found = _within(found, name)
    return _group(found)


def _within(outer: Groups, name: str) -> Groups:
    """Return the groups of what has this name, or those of what it is in."""
    made_of, alone = _named_groups(name)
    return made_of or outer[0], alone or outer[1]


def _group(found: Groups) -> str:
    return found[0] or found[1] or REST


@cache
def _named_groups(name: str) -> Groups:
    made_of, alone = (
        next((g for g, p in known.items() if re.search(p, name, re.IGNORECASE)), None)
        for known in (MADE_OF, ALONE)
    )
    return made_of, alone


@contextmanager
def _ranges(net: nn.Module) -> Iterator[None]:
    """Let the profiler see our kernels inside of one operation, and where a reduction begins."""
    with ExitStack() as undone:
        for kernels in (TRITON, NUMBA):
            if kernels.missing() is None:
                loaded = kernels.load()
                for name in KERNELS:
                    kernel = getattr(loaded, name)
                    undone.callback(setattr, loaded, name, kernel)
                    setattr(loaded, name, _named(name, kernel))
        for module in (m for m in net.modules() if isinstance(m, Reduction)):
            opened = ExitStack()
            begin = partial(_open, opened)
            undone.callback(module.register_forward_pre_hook(begin).remove)
            undone.callback(module.register_forward_hook(lambda *_, o=opened: o.close()).remove)
        yield


def _open(opened: ExitStack, *_: Any) -> None:
    opened.enter_context(record_function(REDUCTION))


def _named(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def run(*args: Any, **options: Any) -> Any:
        with record_function(name):
            return kernel(*args, **options)

    return run
