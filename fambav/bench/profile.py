"""Profiles of a run: shares of its time by layer, and by kind of operation.

By layer, the device is synchronized at every module boundary, and the elapsed time is attributed to
the module at work; boundaries of the backward pass are hooks on gradients.  By operation, torch's
profiler is used.  Both slow a run down, so both report shares and no times.
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
WHOLE, REDUCTION = "fambav whole run", "fambav reduction"  # profiler ranges of ours
# Patterns of names, the first match counts.  COMPOSITE groups own the operations that they call.
COMPOSITE = {
    "pooling": r"fambav::pool|_pool_(for|back)ward|\b_Mean(Backward)?$",
    "matching": rf"fambav::match|_best_partner|_choose_kernel|^{REDUCTION}$",
    "norm": r"norm(?!al)",
}
SINGLE = {
    "conv": r"conv|fprop|dgrad|wgrad",
    "scan": r"scan|\bgate_|_gate_",  # the gate is the last step of the scan
    "attention": r"attention|flash|fmha|(?<!log)(?<!log_)softmax",
    "linear": r"\b_?(baddb|add|b)?mm(_|$|backward)|linear|matmul|gemm|gemv|cutlass|nvjet",
}
GROUPS = ("scan", "conv", "norm", "matching", "pooling", "linear", "attention", REST)
KERNELS = [f"{kind}_{way}" for kind in ("scan", "conv", "gate") for way in ("forward", "backward")]

Subject = tuple[Run, nn.Module, torch.optim.Optimizer | None]  # a run, its model and optimizer
Event = tuple[int, int, str]  # start and end in nanoseconds, and the name of an operation
Groups = tuple[str | None, str | None]  # of COMPOSITE, of SINGLE


def profile(
    subjects: Mapping[str, Subject], *, rounds: int, device: torch.device
) -> dict[str, list[Row]]:
    """Return two tables of shares: by layer, and by operation.

    Args:
        subjects: To be profiled, by name.
        rounds: Runs of each for either table, at least 1.
        device: Of the models.

    Returns:
        By layer, a row for every part and a column for every name, with the forward and backward
        pass of a layer together.  By operation, a row for every name and a column for every group:
        of the time of the run on a CPU, of the time of its kernels on a GPU.  Shares sum to 1.
    """
    layers = {n: by_layer(*one, rounds=rounds, device=device) for n, one in subjects.items()}
    names = dict.fromkeys(part for shares in layers.values() for part in shares if part != REST)
    return {
        "share of the time by layer": [
            {"part": part, **{name: shares.get(part) for name, shares in layers.items()}}
            for part in (*names, REST)
        ],
        "share of the time by operation": [
            {"run": name, **by_operation(run, net, rounds=rounds, device=device)}
            for name, (run, net, _) in subjects.items()
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
    """Return the share of each part of a model, from its minimum over the rounds.

    The minimum excludes interference, which only adds time.
    """
    spent = []
    for _ in range(rounds):
        clock = _Clock(device)
        with _boundaries(clock, net, optimizer):
            run()
            clock.switch(REST)
        spent.append(clock.spent)
    return _shares({part: min(each[part] for each in spent) for part in spent[0]})


def _shares(spent: Mapping[str, float]) -> dict[str, float]:
    whole = sum(spent.values())
    return {name: own / whole for name, own in spent.items()}


class _Clock:
    """Seconds of each part; at first the rest is at work."""

    def __init__(self, device: torch.device) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._device, self.part = device, REST
        settle(device)
        self._since = time.perf_counter()

    def switch(self, part: str) -> None:
        """Attribute the elapsed time to the part at work, and switch to another one."""
        settle(self._device)
        now = time.perf_counter()
        self.spent[self.part] += now - self._since
        self.part, self._since = part, now


@contextmanager
def _boundaries(
    clock: _Clock, net: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[None]:
    """Switch the clock where parts begin and end, forward and backward."""
    outer: list[str] = []  # parts that enclose the one at work

    def before(_: nn.Module, inputs: object, *, part: str) -> None:
        outer.append(clock.part)
        clock.switch(part)
        if outer[-1] != REST:  # once its input has a gradient, the outer part is at work again
            _on_gradient(inputs, partial(clock.switch, outer[-1]))

    def after(_: nn.Module, inputs: object, outputs: object, *, part: str) -> None:
        clock.switch(outer.pop())
        _on_gradient(outputs, partial(clock.switch, part))

    with ExitStack() as hooks:
        for part, module in parts(net).items():
            enter, leave = partial(before, part=part), partial(after, part=part)
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        if optimizer is not None:
            begin = optimizer.register_step_pre_hook(lambda *_: clock.switch("optimizer"))
            end = optimizer.register_step_post_hook(lambda *_: clock.switch(REST))
            hooks.callback(begin.remove)
            hooks.callback(end.remove)
        yield


def parts(net: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a model by name.

    Of ours: the patch embedding, the layers from 1, the head, and the reduction, which is called
    within layers but counted on its own.  Of others: the children with parameters, where a list of
    several is replaced by its items; those of the longest list are layers.
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
    named: dict[str, nn.Module] = {}
    for name, child in net.named_children():
        if name in lists:
            kind = "layer" if name == longest else name
            named |= {f"{kind} {n}": one for n, one in enumerate(lists[name], start=1)}
        elif any(True for _ in child.parameters()):
            named[name] = child
    return named


def _on_gradient(values: object, call: Callable[[], None]) -> None:
    """Call once the first tensor of nested tuples gets its gradient."""
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
    """Return the share of each group of operations; on a CPU from its minimum over the rounds."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with _ranges(net), torch_profile(activities=activities) as profiler:
        for _ in range(rounds):
            with record_function(WHOLE):
                run()
        settle(device)
    # The profiler's own tables take seconds for some thousand events.
    events = profiler.profiler.kineto_results.events()
    runs = [kernel_times(events)] if gpu else operation_times(_of_one_thread(events))
    return _shares({name: min(spent[name] for spent in runs) for name in GROUPS})


def kernel_times(events: Iterable[Any]) -> Counter[str]:
    """Sum the times of GPU kernels by group, without user annotations."""
    spent: Counter[str] = Counter()
    for event in events:
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            spent[group([event.name()])] += event.duration_ns()
    return spent


def _of_one_thread(events: Iterable[Any]) -> list[Event]:
    """Return the CPU events of the thread of the runs."""
    on_cpu = [e for e in events if e.device_type() == DeviceType.CPU]
    thread = next(e.start_thread_id() for e in on_cpu if e.name() == WHOLE)
    return [
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name())
        for e in on_cpu
        if e.start_thread_id() == thread
    ]


def operation_times(events: Sequence[Event]) -> list[Counter[str]]:
    """Sum the self times of the operations of each run by group."""
    runs: list[Counter[str]] = []
    stack: list[tuple[int, Groups]] = []  # end and groups of the enclosing operations
    for start, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while stack and start >= stack[-1][0]:
            stack.pop()
        if not stack:
            if name != WHOLE:
                continue
            runs.append(Counter())
        outer = stack[-1][1] if stack else (None, None)
        own = _within(outer, name)
        runs[-1][_group(own)] += end - start
        if stack:
            runs[-1][_group(outer)] -= end - start
        stack.append((end, own))
    return runs


def group(names: Sequence[str]) -> str:
    """Return the group of an operation.

    Args:
        names: Its name, then those of its callers, innermost first.
    """
    groups: Groups = (None, None)
    for name in reversed(names):
        groups = _within(groups, name)
    return _group(groups)


def _within(outer: Groups, name: str) -> Groups:
    """Return the groups of an operation, or those of its caller."""
    composite, single = _groups_of(name)
    return composite or outer[0], single or outer[1]


def _group(groups: Groups) -> str:
    return groups[0] or groups[1] or REST


@cache
def _groups_of(name: str) -> Groups:
    composite, single = (
        next((g for g, p in patterns.items() if re.search(p, name, re.IGNORECASE)), None)
        for patterns in (COMPOSITE, SINGLE)
    )
    return composite, single


@contextmanager
def _ranges(net: nn.Module) -> Iterator[None]:
    """Mark our kernels and the reductions as profiler ranges."""
    with ExitStack() as undo:
        for kernels in (TRITON, NUMBA):
            if kernels.unavailable() is None:
                loaded = kernels.load()
                for name in KERNELS:
                    kernel = getattr(loaded, name)
                    undo.callback(setattr, loaded, name, kernel)
                    setattr(loaded, name, _ranged(name, kernel))
        for module in (m for m in net.modules() if isinstance(m, Reduction)):
            opened = ExitStack()
            begin = partial(_open, opened)
            undo.callback(module.register_forward_pre_hook(begin).remove)
            undo.callback(module.register_forward_hook(lambda *_, o=opened: o.close()).remove)
        yield


def _open(opened: ExitStack, *_: Any) -> None:
    opened.enter_context(record_function(REDUCTION))


def _ranged(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def run(*args: Any, **options: Any) -> Any:
        with record_function(name):
            return kernel(*args, **options)

    return run
