"""Forward passes alone: how many images a second, and how long one image takes.

first call -> warm-up -> rounds, in each of which every candidate runs once
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fambav.bench.candidates import (
    EAGER,
    Candidate,
    candidates,
    images,
    some,
)
from fambav.bench.ceilings import Ceilings
from fambav.bench.counts import flops
from fambav.bench.report import Report, Row, settings
from fambav.bench.scan import positive, training_dtype
from fambav.bench.split import Watched, split
from fambav.bench.stack import stack
from fambav.engine.runtime import numerics
from fambav.engine.timing import (
    Run,
    Times,
    allocated_mib,
    captured,
    first_ms,
    interleave,
    quartiles,
    ratios,
    spread,
)
from fambav.models import Backbone
from fambav.ops import BackendError

BATCH = {"cuda": 128, "cpu": 8}


class Forward(NamedTuple):
    """A model that has been called once, on images that stay the same.

    Attributes:
        net: The model, in evaluation mode.
        eager: A forward pass without gradients; returns the logits.
        run: The same, as it is launched.
        first_ms: Milliseconds of the first call, with all that had to be compiled for it, or of
            all calls until it was recorded.
    """

    net: nn.Module
    eager: Run
    run: Run
    first_ms: float

    @classmethod
    def of(cls, candidate: Candidate, batch: int, device: torch.device) -> Forward:
        """Make a model and call it.

        Raises:
            BackendError: If its backend cannot run here.
            RuntimeError: If it cannot be recorded.
        """
        net = candidate.network(device).eval()
        given = images(net, batch, device)
        precision = candidate.precision(device)
        # A weight that has been converted before would not be converted again in a replay.
        cached = candidate.launch == EAGER

        def eager() -> Tensor:
            with stack(candidate.backend), torch.no_grad(), precision.autocast(cached=cached):
                logits: Tensor = net(given)
                return logits

        made: list[Run] = [eager]
        first = eager if candidate.launch == EAGER else lambda: made.append(captured(eager))
        spent = first_ms(first, device)
        return cls(net, eager, made[-1], spent)


def infer(
    *,
    batch: int | None = None,
    rounds: int = 9,
    warmup: int = 2,
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
    ceilings: bool = False,
    parts: bool = False,
    alone: bool = False,
    **which: Any,
) -> Report:
    """Measure forward passes in evaluation mode and without gradients, on random images.

    Args:
        batch: Images; by default 128 on a GPU and 8 on a CPU.
        rounds: How often each candidate is timed, at least 1.
        warmup: Rounds before those, beyond the first call.
        device: Where.
        dtypes: Of the forward pass, under autocast; by default that of training there.
        ceilings: Also measure a copy and products, and set all beside them, as `Ceilings` does.
        parts: Also tell where the time goes, by layer and by operation, as `split` does.
        alone: Time each call from an idle device to an idle device.
        which: What is compared, as `candidates` takes it.

    Returns:
        A row for each candidate:
            first_call_ms   with all that is compiled, but for what an earlier row has compiled
            images_per_s    from the median
            times_faster    than the first row within each round: median and quartiles
            peak_mib        that PyTorch allocates for a pass beyond weights and images
            gflop_per_image, gflop_per_s    as `counts.flops` counts them

    Raises:
        ValueError: If a number is too small, or as `candidates`.
        MeasureError: If no candidate can run here.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtypes = [training_dtype(device)] if dtypes is None else dtypes
    positive(batch=batch, rounds=rounds)
    given = candidates(dtypes=dtypes, device=device, **which)
    with numerics(deterministic=False, matmul_precision="high"):
        made, skipped = _made(given, batch, device)
        limits = Ceilings(device, dtypes if ceilings else ())
        runs: dict[Any, Run] = {key: ready.run for key, ready in made.items()}
        options: dict[str, Any] = dict(rounds=rounds, warmup=warmup, device=device, alone=alone)
        times = interleave({**runs, **limits.runs()}, **options)
        rows = tuple(
            _row(key, ready, times, limits, (batch, device)) for key, ready in made.items()
        )
        tables = limits.tables(times)
        if parts:
            tables |= split(_watched(made), rounds=rounds, device=device)
    told: dict[str, Any] = dict(method=given[0].method, batch=batch, rounds=rounds)
    title = "one call at a time" if alone else "forward passes"
    about = settings(device, **told, memory="allocated")
    return Report(title=title, settings=about, rows=rows, skipped=skipped, tables=tables)


def latency(**given: Any) -> Report:
    """Measure single images, each from an idle device to its logits; see `infer`."""
    return infer(batch=1, alone=True, **given)


def _made(
    given: Sequence[Candidate], batch: int, device: torch.device
) -> tuple[dict[Candidate, Forward], dict[str, str]]:
    """Call every candidate once, and say why some cannot run or be recorded."""
    found: dict[Candidate, Forward] = {}
    refused: dict[str, str] = {}
    for candidate in given:
        try:
            found[candidate] = Forward.of(candidate, batch, device)
        except BackendError as error:
            refused[candidate.name] = str(error)
        except RuntimeError as error:
            if candidate.launch == EAGER:
                raise
            refused[candidate.name] = str(error).splitlines()[0]
    return found, some(found, refused)


def _watched(made: Mapping[Candidate, Forward]) -> dict[str, Watched]:
    """Return what may be split: a replay tells nothing of its parts."""
    return {k.name: Watched(one.run, one.net) for k, one in made.items() if k.launch == EAGER}


def _row(
    key: Candidate,
    ready: Forward,
    times: Mapping[Any, Times],
    limits: Ceilings,
    given: tuple[int, torch.device],
) -> Row:
    (batch, device), own = given, times[key]
    low, faster, high = quartiles(ratios(times[next(iter(times))], own))
    return {
        **key.row(),
        "token_layers_left": share(ready.net),
        "images_per_s": 1000 * batch / statistics.median(own),
        **spread(own),
        "times_faster": faster,
        "faster_quartiles": (low, high),
        "first_call_ms": ready.first_ms,
        "peak_mib": allocated_mib(ready.eager, device),
        **limits.beside(times, key, key.dtype, batch=batch, flops=flops(key), run=ready.eager),
    }


def share(net: nn.Module) -> float | None:
    """Return the share of token-layers that is left; None for a model that is not ours."""
    return net.schedule.share if isinstance(net, Backbone) else None
