"""Where the time of a run goes: by layer, and by operation.

By layer, the device is waited for at every boundary of a module, and what passed is put down to the
module that was at work; a backward pass tells its boundaries by gradients that arrive.  By
operation, torch's profiler tells.  Both slow a run down, so both give shares and no times.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from fambav.bench.report import Row
from fambav.engine.timing import Run, settle
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


class Watched(NamedTuple):
    """What is split.

    Attributes:
        run: Does all of it once.
        net: The model in it.
        optimizer: What changes the weights; None if nothing does.
    """

    run: Run
    net: nn.Module
    optimizer: torch.optim.Optimizer | None = None


def split(
    watched: Mapping[str, Watched], *, rounds: int, device: torch.device
) -> dict[str, tuple[Row, ...]]:
    """Return two tables of shares: by layer, and by operation.

    Args:
        watched: What to split, by name.
        rounds: How often each is run for either, at least 1.
        device: Where.

    Returns:
        By layer a row for every part and a column for every name; forward and backward pass of a
        layer are together.  By operation a row for every name and a column for every group: on a
        CPU of the time of the run, on a GPU of the time of its kernels.  Shares add up to 1.
    """
    layers = {name: by_layer(one, rounds=rounds, device=device) for name, one in watched.items()}
    parts = dict.fromkeys(part for shares in layers.values() for part in shares if part != REST)
    return {
        "share of the time by layer": tuple(
            {"part": part, **{name: shares.get(part) for name, shares in layers.items()}}
            for part in (*parts, REST)
        ),
        "share of the time by operation": tuple(
            {"run": name, **by_operation(one, rounds=rounds, device=device)}
            for name, one in watched.items()
        ),
    }


def by_layer(watched: Watched, *, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the share of each part of a model, from the least that it took in any round.

    What disturbs a part only ever adds to it, and seldom in every round.
    """
    rows: list[dict[str, float]] = []
    for _ in range(rounds):
        clock = _Clock(device)
        with _boundaries(clock, watched):
            clock.start()
            watched.run()
            clock.turn(REST)
        rows.append(clock.spent)
    least = {part: min(row[part] for row in rows) for part in rows[0]}
    whole = sum(least.values())
    return {part: seconds / whole for part, seconds in least.items()}


class _Clock:
    """Seconds of each part, by turns."""

    def __init__(self, device: torch.device) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._device, self._stack, self._now, self._since = device, [REST], REST, 0.0

    def start(self) -> None:
        settle(self._device)
        self._since = time.perf_counter()

    def turn(self, part: str) -> None:
        """Put what passed down to the part at work; another one is at work from now on."""
        settle(self._device)
        now = time.perf_counter()
        self.spent[self._now] += now - self._since
        self._now, self._since = part, now

    def enter(self, part: str) -> str:
        """Begin a part inside of the one at work, which is returned."""
        outer = self._now
        self._stack.append(part)
        self.turn(part)
        return outer

    def leave(self) -> None:
        """End the part at work."""
        self._stack.pop()
        self.turn(self._stack[-1])


@contextmanager
def _boundaries(clock: _Clock, watched: Watched) -> Iterator[None]:
    """Tell the clock when a part begins and ends, forward and backward."""

    def before(_: nn.Module, given: tuple[Any, ...], *, part: str) -> None:
        outer = clock.enter(part)
        if outer != REST:  # a part of another part: the gradient of its input is the other's again
            _when(_first(given), partial(clock.turn, outer))

    def after(_: nn.Module, given: object, result: object, *, part: str) -> None:
        clock.leave()
        _when(_first(result), partial(clock.turn, part))

    with ExitStack() as hooks:
        for part, module in parts(watched.net).items():
            enter, leave = partial(before, part=part), partial(after, part=part)
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        if watched.optimizer is not None:
            begin = watched.optimizer.register_step_pre_hook(lambda *_: clock.turn("optimizer"))
            end = watched.optimizer.register_step_post_hook(lambda *_: clock.turn(REST))
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


def _first(values: object) -> Tensor | None:
    """Return the first tensor in nested tuples."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, tuple | list):
        return next(filter(lambda t: t is not None, map(_first, values)), None)
    return None


def _when(tensor: Tensor | None, call: Callable[[], None]) -> None:
    """Call when the gradient of a tensor arrives."""
    if tensor is not None and tensor.requires_grad:
        tensor.register_hook(lambda _: call())


def by_operation(watched: Watched, *, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the share of each group of operations, on a CPU from the least that it took."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with _ranges(watched.net, device), profile(activities=activities) as profiler:
        for _ in range(rounds):
            with record_function(WHOLE):
                watched.run()
        settle(device)
    events = [_Event.of(e) for e in profiler.profiler.kineto_results.events()]
    runs = [_of_kernels(events)] if device.type == "cuda" else _of_cpu(events)
    least = {name: min(spent[name] for spent in runs) for name in GROUPS}
    whole = sum(least.values())
    return {name: spent / whole for name, spent in least.items()}


class _Event(NamedTuple):
    """What the profiler saw, from `start` to `end` in nanoseconds."""

    name: str
    start: int
    end: int
    thread: int = 0
    device: DeviceType = DeviceType.CPU
    named: bool = False  # a range that somebody opened, and no operation

    @classmethod
    def of(cls, event: Any) -> _Event:
        """Read one of the profiler's own; its tables would take seconds for some thousands."""
        end = event.start_ns() + event.duration_ns()
        thread = event.start_thread_id()
        named = event.is_user_annotation()
        return cls(event.name(), event.start_ns(), end, thread, event.device_type(), named)


class _Open(NamedTuple):
    """A range that has not ended, and the groups of what is in it and has no name of its own."""

    end: int
    made_of: str | None
    alone: str | None

    @property
    def group(self) -> str:
        return self.made_of or self.alone or REST

    def within(self, name: str, end: int) -> _Open:
        """Return a range inside of this one."""
        made_of, alone = _named_group(name)
        return _Open(end, made_of or self.made_of, alone or self.alone)


_OUTSIDE = _Open(0, None, None)


def _of_kernels(events: Sequence[_Event]) -> Counter[str]:
    """Add the times of a GPU's kernels up by group."""
    spent: Counter[str] = Counter()
    for event in events:
        if event.device == DeviceType.CUDA and not event.named:
            spent[group([event.name])] += event.end - event.start
    return spent


def _of_cpu(events: Sequence[_Event]) -> list[Counter[str]]:
    """Add the times of all inside of each run, each without what it calls, up by group."""
    thread = next(e.thread for e in events if e.name == WHOLE)
    runs: list[Counter[str]] = []
    opened: list[_Open] = []
    here = (e for e in events if e.thread == thread and e.device == DeviceType.CPU)
    for event in sorted(here, key=lambda e: (e.start, -e.end)):
        while opened and event.start >= opened[-1].end:
            opened.pop()
        if not opened and event.name != WHOLE:
            continue
        if not opened:
            runs.append(Counter())
        spent = runs[-1]
        outer = opened[-1] if opened else None
        opened.append((outer or _OUTSIDE).within(event.name, event.end))
        spent[opened[-1].group] += event.end - event.start
        if outer is not None:
            spent[outer.group] -= event.end - event.start
    return runs


def group(names: Sequence[str]) -> str:
    """Return the group of an operation.

    Args:
        names: Its name, then those of what it is called by, from within.
    """
    found = _OUTSIDE
    for name in reversed(names):
        found = found.within(name, 0)
    return found.group


@cache
def _named_group(name: str) -> tuple[str | None, str | None]:
    """Return what a name tells: a group that owns what it is made of, and one that does not."""
    made_of, alone = (
        next((g for g, p in known.items() if re.search(p, name, re.IGNORECASE)), None)
        for known in (MADE_OF, ALONE)
    )
    return made_of, alone


@contextmanager
def _ranges(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the profiler see our kernels inside of one operation, and where a reduction begins."""
    with ExitStack() as undone:
        for kernels in (TRITON,) if device.type == "cuda" else (TRITON, NUMBA):
            if kernels.missing() is None:
                loaded = kernels.load()
                for name in _kernel_names():
                    if hasattr(loaded, name):
                        undone.callback(setattr, loaded, name, getattr(loaded, name))
                        setattr(loaded, name, _named(name, getattr(loaded, name)))
        for module in (m for m in net.modules() if isinstance(m, Reduction)):
            opened: list[record_function] = []
            undone.callback(module.register_forward_pre_hook(partial(_open, opened)).remove)
            undone.callback(module.register_forward_hook(partial(_close, opened)).remove)
        yield


def _kernel_names() -> tuple[str, ...]:
    """Names of the kernels that the fused mixer calls."""
    kinds = ("scan", "conv", "gate")
    return tuple(f"{kind}_{way}" for kind in kinds for way in ("forward", "backward"))


def _named(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def run(*args: Any, **options: Any) -> Any:
        with record_function(name):
            return kernel(*args, **options)

    return run


def _open(opened: list[record_function], *_: Any) -> None:
    opened.append(record_function(REDUCTION))
    opened[-1].__enter__()


def _close(opened: list[record_function], *_: Any) -> None:
    opened.pop().__exit__(None, None, None)
