"""What token fusion saves in a training step, and what the merging itself costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fambav.bench.report import Report, Row, settings
from fambav.bench.scan import positive, training_dtype
from fambav.bench.stack import stack
from fambav.bench.step import BATCH, Step, training
from fambav.engine.runtime import numerics
from fambav.engine.timing import Run, Times, captured, interleave, ratio, spread
from fambav.layers import Tokens
from fambav.registry import STRATEGIES, STRATEGY_ALIASES, nearest

NONE = "none"
# For 24 layers and 197 tokens: the plans of the paper's table 1, a late one, and one token a layer.
PLANS = ("upper:6:9", "upper:14:14", "interleaved:14", "lower:19:9", "all:7", "all:1")


class Plan(NamedTuple):
    """Which layers fuse how many tokens.

    Attributes:
        name: strategy:layer:tokens or strategy:tokens, as on the command line.
        fusion: The same as arguments of a model.
    """

    name: str
    fusion: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan such as "upper:6:9", layers counted from 1, or "none".

        Raises:
            ValueError: If it has another form.
        """
        strategy, *numbers = text.split(":")
        known = (*STRATEGIES, *STRATEGY_ALIASES)
        if strategy not in known:
            hint = nearest(strategy, known)
            raise ValueError(f"plan is {text!r}, expected strategy:layer:tokens; {hint}")
        if STRATEGY_ALIASES.get(strategy, strategy) == NONE and not numbers:
            return cls(NONE, {})
        wanted = 2 if strategy in ("lower", "upper") else 1
        if len(numbers) != wanted or not all(re.fullmatch(r"[1-9]\d*", n) for n in numbers):
            form = "layer:tokens" if wanted == 2 else "tokens"
            raise ValueError(f"plan is {text!r}, expected {strategy}:{form}")
        *layer, token = map(int, numbers)
        fusion: dict[str, Any] = dict(fusion_strategy=strategy, fusion_token=token)
        return cls(text, fusion | ({"fusion_layer": layer[0]} if layer else {}))


def strategies(
    *,
    model: str = "vim_tiny",
    plans: Sequence[str] = PLANS,
    method: str = "famba-v",
    batch: int | None = None,
    rounds: int = 5,
    warmup: int = 2,
    device: torch.device,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    cuda_graphs: bool = False,
) -> Report:
    """Measure training steps under several plans, all in every round.

    Args:
        model: One of ours.
        plans: Which layers fuse how many tokens, as `Plan.parse` reads them; none is added.
        method: How tokens are merged.
        batch: Images; by default 128 on a GPU and 2 on a CPU.
        rounds: How often each candidate is timed, at least 1.
        warmup: Rounds before those.
        device: Where.
        dtype: Of the forward pass; by default that of training there.
        backend: What operations run by; None for the fastest.
        cuda_graphs: Record the passes of every step.

    Returns:
        A row for every plan: the share of token-layers and of the step's time that are left, how
        many times faster the step is, and the time of all merging, forward and backward, alone.  On
        a GPU merging is timed as a replay, without the launches that hide behind other kernels.

    Raises:
        ValueError: If a plan cannot be read or carried out, or a number is too small.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch)
    wanted = [Plan.parse(text) for text in plans]
    chosen = {p.name: p.fusion | {"fusion_method": method} for p in wanted if p.name != NONE}
    options: dict[str, Any] = dict(batch=batch, device=device, dtype=dtype, backend=backend)
    with numerics(deterministic=False, matmul_precision="high"):
        steps = {
            name: training(model, fusion=fusion, cuda_graphs=cuda_graphs, **options)
            for name, fusion in {NONE: {}, **chosen}.items()
        }
        runs: dict[tuple[str, str], Run] = {(n, "step"): s.run for n, s in steps.items()}
        for name in chosen:
            merging = Merging(steps[name]).run
            runs[name, "merging"] = captured(merging) if device.type == "cuda" else merging
        times = interleave(runs, rounds=rounds, warmup=warmup, device=device)
        peaks = {name: ready.peak_mib() for name, ready in steps.items()}
    told = dict(model=model, method=method, batch=batch, rounds=rounds, cuda_graphs=cuda_graphs)
    return Report(
        title="training step with token fusion, against none",
        settings=settings(device, dtype, **told, backend=backend or "fastest"),
        rows=tuple(_row(name, ready, times, peaks) for name, ready in steps.items()),
        skipped={},
    )


def _row(
    name: str, ready: Step, times: dict[tuple[str, str], Times], peaks: dict[str, float]
) -> Row:
    own, merging = times[name, "step"], times.get((name, "merging"))
    share = ready.net.schedule.share
    left = ratio(own, times[NONE, "step"])
    return {
        "plan": name,
        "last_length": ready.net.schedule.lengths[-1],
        "token_layers_left": share,
        "time_left": left,
        "times_faster": ratio(times[NONE, "step"], own),
        "memory_left": peaks[name] / peaks[NONE] if peaks[NONE] else None,
        **spread(own),
        "peak_mib": peaks[name],
        "merging_ms": None if merging is None else spread(merging)["median_ms"],
        "merging_share": ratio(merging, own),
    }


class Merging:
    """All that a model's reduction does in one step, on the very tokens that it meets there.

    Args:
        step: A model, and a batch that goes through it once to find those tokens.
        layers: Only the first so many that merge; None for all.
    """

    def __init__(self, step: Step, *, layers: int | None = None) -> None:
        self._reduction, self._backend = step.net.reduction, step.backend
        self._precision, counts = step.update.precision, self._reduction.schedule.counts
        met: list[tuple[Tokens, int]] = []

        def look(_: nn.Module, given: tuple[Tokens], options: dict[str, int]) -> None:
            if counts[options["layer"]]:
                met.append((_leaves(given[0]), options["layer"]))

        hook = self._reduction.register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad(), stack(self._backend), self._precision.autocast():
            step.net(step.batch[0])
        hook.remove()
        self.met = met[:layers]
        self._grads = [_grads(tokens, counts[layer]) for tokens, layer in self.met]

    def run(self) -> object:
        """Merge at every layer, and pass gradients back."""
        found = []
        with stack(self._backend):
            for (tokens, layer), grads in zip(self.met, self._grads, strict=True):
                with self._precision.autocast():
                    fewer = self._reduction(tokens, layer=layer)
                found.append(torch.autograd.grad(_streams(fewer), _streams(tokens), grads))
        return found


def _streams(tokens: Tokens) -> tuple[Tensor, ...]:
    """Return what has a gradient."""
    return tuple(stream for stream in (tokens.x, tokens.residual) if stream is not None)


def _leaves(tokens: Tokens) -> Tokens:
    """Copy both streams, as leaves."""
    x, *residual = (stream.detach().clone().requires_grad_() for stream in _streams(tokens))
    return tokens._replace(x=x, residual=residual[0] if residual else None)


def _grads(tokens: Tokens, count: int) -> tuple[Tensor, ...]:
    """Draw gradients of what is left of both streams."""
    return tuple(torch.randn_like(stream[:, count:]) for stream in _streams(tokens))
