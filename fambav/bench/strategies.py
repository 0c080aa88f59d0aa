"""What token fusion saves in a training step, and what the merging itself costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fambav.bench.candidates import METHOD, NONE, REPLAYED, candidates
from fambav.bench.memory_model import fit
from fambav.bench.report import Report, Row, settings
from fambav.bench.scan import positive, training_dtype
from fambav.bench.stack import stack
from fambav.bench.step import BATCH, Step, training
from fambav.engine.runtime import numerics
from fambav.engine.timing import Run, Times, captured, interleave, ratio, spread
from fambav.layers import Tokens
from fambav.models import Backbone
from fambav.reduction import Schedule

# For 24 layers and 197 tokens: the plans of the paper's table 1, a late one, and one token a layer.
PLANS = ("upper:6:9", "upper:14:14", "interleaved:14", "lower:19:9", "all:7", "all:1")
MEMORY = "model of the peak memory"


def strategies(
    *,
    model: str = "vim_tiny",
    plans: Sequence[str] = PLANS,
    method: str = METHOD,
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
        With enough plans, also the model of memory of `memory_model` and how far it is off.

    Raises:
        ValueError: If a plan cannot be read or carried out, or a number is too small.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch)
    which: dict[str, Any] = dict(
        model=model, plans=(NONE, *plans), method=method, cuda_graphs=cuda_graphs
    )
    given = candidates(names=(backend,), dtypes=(dtype,), device=device, **which)
    given = [c for c in given if (c.launch == REPLAYED) == cuda_graphs]
    with numerics(deterministic=False, matmul_precision="high"):
        steps = {c.plan: training(c, batch=batch, device=device) for c in given}
        runs: dict[tuple[str, str], Run] = {(n, "step"): s.run for n, s in steps.items()}
        for name in (plan for plan in steps if plan != NONE):
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
        tables=_memory(steps, peaks),
    )


def _memory(steps: Mapping[str, Step], peaks: Mapping[str, float]) -> dict[str, tuple[Row, ...]]:
    """Return a table with the model of memory; no table if the plans are too few."""
    found = fit([_schedule(ready) for ready in steps.values()], [*peaks.values()])
    return {} if found is None else {MEMORY: (found.row(max(peaks.values())),)}


def _schedule(ready: Step) -> Schedule:
    return cast(Backbone, ready.net).schedule


def _row(
    name: str, ready: Step, times: dict[tuple[str, str], Times], peaks: dict[str, float]
) -> Row:
    own, merging = times[name, "step"], times.get((name, "merging"))
    schedule = _schedule(ready)
    left = ratio(own, times[NONE, "step"])
    return {
        "plan": name,
        "last_length": schedule.lengths[-1],
        "token_layers_left": schedule.share,
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
        self._reduction, self._backend = cast(Backbone, step.net).reduction, step.backend
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
