"""Savings of token fusion in a training step, and the cost of merging itself.

Peak memory is fitted to the tokens of each plan:

    peak = constant + a * tokens over all mixers + b * tokens that the layers that fuse receive

`a` is the memory that a mixer keeps per token, `b` that which fusing adds per token compared: a
layer that fuses pays off once it has removed b / a of its tokens from every layer from it up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from fambav.bench.candidates import METHOD, NONE, REPLAYED, candidates, use_backend
from fambav.bench.passes import STEP_BATCH, Step, training
from fambav.bench.reduction import streams, token_leaves
from fambav.bench.report import Report, Row, positive, settings, training_dtype
from fambav.bench.timing import Run, Times, captured, interleave, ratio, spread
from fambav.engine.precision import determinism_settings
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
        plans: Which layers fuse how many tokens, schedules as for `fambav.reduce`; none is added.
        method: How tokens are merged.
        backend: What operations run by; None for the fastest.
        cuda_graphs: Record the passes of every step.

    Returns:
        A row for every plan: the remaining share of token-layers, of step time and of memory, the
        speed-up of the step, and the time of all merging, forward and backward, on its own.  On a
        GPU merging is timed as a replay, without launches that overlap with other kernels.  With
        enough plans, also the fit of memory and its error.

    Raises:
        ValueError: If a plan is malformed or cannot be carried out, or a number is too small.
    """
    batch = STEP_BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch)
    which: dict[str, Any] = dict(model=model, method=method, cuda_graphs=cuda_graphs)
    plans, dtypes = (NONE, *plans), (dtype,)
    given = candidates(names=(backend,), plans=plans, dtypes=dtypes, device=device, **which)
    with determinism_settings(deterministic=False, matmul_precision="high"):
        steps = {
            c.plan: training(c, batch=batch, device=device)
            for c in given
            if (c.launch == REPLAYED) == cuda_graphs
        }
        runs: dict[tuple[str, str], Run] = {(n, "step"): s.run for n, s in steps.items()}
        for name in (plan for plan in steps if plan != NONE):
            merging = Merging(steps[name]).run
            runs[name, "merging"] = captured(merging) if device.type == "cuda" else merging
        times = interleave(runs, rounds=rounds, warmup=warmup, device=device)
        peaks = {name: ready.peak_mib() for name, ready in steps.items()}
    schedules = {name: cast(Backbone, ready.net).schedule for name, ready in steps.items()}
    fitted = fit_memory([*schedules.values()], [*peaks.values()])
    about: dict[str, Any] = dict(model=model, method=method, batch=batch, rounds=rounds)
    about |= dict(cuda_graphs=cuda_graphs, backend=backend or "fastest")
    return Report(
        title="training step with token fusion, against none",
        settings=settings(device, dtype, **about),
        rows=[_row(name, schedules[name], times, peaks) for name in steps],
        tables={} if fitted is None else {MEMORY: [fitted]},
    )


def _row(
    name: str,
    schedule: Schedule,
    times: Mapping[tuple[str, str], Times],
    peaks: Mapping[str, float],
) -> Row:
    own, none, merging = times[name, "step"], times[NONE, "step"], times.get((name, "merging"))
    return {
        "plan": name,
        "last_length": schedule.lengths[-1],
        "token_layers_left": schedule.share,
        "time_left": ratio(own, none),
        "times_faster": ratio(none, own),
        "memory_left": peaks[name] / peaks[NONE] if peaks[NONE] else None,
        **spread(own),
        "peak_mib": peaks[name],
        "merging_ms": None if merging is None else spread(merging)["median_ms"],
        "merging_share": ratio(merging, own),
    }


def fit_memory(schedules: Sequence[Schedule], peaks: Sequence[float]) -> Row | None:
    """Fit peak memory, in MiB, to the tokens of each plan by least squares.

    Returns:
        The coefficients and the error of the fit; None with fewer than four plans, or if they do
        not determine the three coefficients.
    """
    rows = [(1.0, *map(float, tokens_seen(schedule))) for schedule in schedules]
    x, y = torch.tensor(rows, dtype=torch.float64), torch.tensor(peaks, dtype=torch.float64)
    if len(rows) < 4 or int(torch.linalg.matrix_rank(x)) < 3:
        return None
    # By QR, since the normal equations of columns of 1 and of thousands are ill-conditioned.
    q, upper = torch.linalg.qr(x)
    fit = torch.linalg.solve_triangular(upper, (q.mT @ y)[:, None], upper=True)[:, 0]
    constant, mixing, fusing = fit.tolist()
    residuals = (y - x @ fit).tolist()
    rms = math.sqrt(sum(r * r for r in residuals) / len(residuals))
    return {
        "plans": len(residuals),
        "constant_mib": constant,
        "mixing_kib_per_token": 1024 * mixing,
        "fusing_kib_per_token": 1024 * fusing,
        "rms_mib": rms,
        "worst_mib": max(map(abs, residuals)),
        "rms_share": rms / max(peaks),
    }


def tokens_seen(schedule: Schedule) -> tuple[int, int]:
    """Return the tokens summed over all mixers, and over the inputs of the layers that fuse."""
    counts, lengths = schedule.counts, schedule.lengths
    removed = 0 if schedule.after else 1
    fused = sum(n + removed * count for n, count in zip(lengths, counts, strict=True) if count)
    return sum(lengths), fused


class Merging:
    """The reduction of a model in one step, on the tokens that it gets there.

    Args:
        step: A model and a batch, which passes through it once to collect those tokens.
        layers: Only the first so many that merge; None for all.

    Attributes:
        inputs: Tokens and index of each layer that merges.
    """

    def __init__(self, step: Step, *, layers: int | None = None) -> None:
        self._reduction, self._backend = cast(Backbone, step.net).reduction, step.backend
        self._precision, counts = step.update.precision, self._reduction.schedule.counts
        inputs: list[tuple[Tokens, int]] = []

        def collect(_: nn.Module, args: tuple[Tokens], options: dict[str, int]) -> None:
            if counts[options["layer"]]:
                inputs.append((token_leaves(args[0])[0], options["layer"]))

        hook = self._reduction.register_forward_pre_hook(collect, with_kwargs=True)
        with torch.no_grad(), use_backend(self._backend), self._precision.autocast():
            step.net(step.batch[0])
        hook.remove()
        self.inputs = inputs[:layers]
        self._grads = [
            [torch.randn_like(stream[:, counts[layer] :]) for stream in streams(tokens)]
            for tokens, layer in self.inputs
        ]

    def run(self) -> object:
        """Merge at every layer, forward and backward; return the gradients."""
        grads_in = []
        with use_backend(self._backend):
            for (tokens, layer), grads in zip(self.inputs, self._grads, strict=True):
                with self._precision.autocast():
                    fewer = self._reduction(tokens, layer=layer)
                grads_in.append(torch.autograd.grad(streams(fewer), streams(tokens), grads))
        return grads_in
