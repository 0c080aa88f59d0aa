"""What it costs that mixers tell what they compute, or scan across gaps: measured before training.

A fused mixer keeps step sizes and scan outputs to itself.  A reduction that reads them, or lets the
state age over tokens that went, makes some mixers run composed of single scans.  One that scatters
tokens over a grid has mixers look up where each stands.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fambav.engine.runtime import Precision
from fambav.engine.timing import Run, Times, interleave, ratios
from fambav.layers import OUTPUT, Tokens
from fambav.models import Backbone
from fambav.reduction import Reduction

BATCH = 8
TURN_MS = 20.0  # of the plain mixer; shorter turns drown in the noise of a busy machine
FEW, MANY = 3, 5  # rounds of calls that last as long on their own, and of repeated ones


class Kind(NamedTuple):
    """Mixers that are asked for the same reason.

    Attributes:
        reason: What they do, after "mixers".
        layers: Where, from 1.
        want, gap_policy: As in `Hooks`.
        whole: Whether this is measured on a whole grid, where nothing has to be looked up.
    """

    reason: str
    layers: Sequence[int]
    want: frozenset[str] = frozenset()
    gap_policy: str | None = None
    whole: bool = False


def exposure(net: Backbone, precision: Precision) -> str | None:
    """Say which mixers of a model are asked, why, and how much longer they take.

    Args:
        net: On the device it will run on.
        precision: Of the forward pass.

    Returns:
        A line; None if no mixer is asked.
    """
    asked = kinds(net.reduction)
    if not asked:
        return None
    reasons = " and ".join(f"{kind.reason} at layers {_listed(kind.layers)}" for kind in asked)
    times = " and ".join(f"{factor:.1f}" for factor in _times_as_long(net, asked, precision))
    such = "such a one takes" if len(asked) == 1 else "such take"
    return (
        f"{net.reduction.name}: mixers {reasons}; {such} {times} times as long as one that is not "
        f"asked (measured, forward and backward)"
    )


def kinds(reduction: Reduction) -> list[Kind]:
    """Group the mixers that a reduction asks by the reason; one that has two is in both groups."""
    schedule, needs = reduction.schedule, reduction.needs - OUTPUT
    hooks = {layer + 1: reduction.hooks(layer) for layer in range(reduction.info.depth)}
    telling = [layer for layer, hook in hooks.items() if hook.want - OUTPUT]
    aging = [layer for layer, hook in hooks.items() if hook.gap_policy is not None]
    # Only among tokens that went are there gaps: whoever scans across them has looked places up.
    placing = [
        layer
        for layer, hook in hooks.items()
        if reduction.info.needs_positions
        and hook.gap_policy is None
        and schedule.lengths[layer - 1] < schedule.start
    ]
    # Carried gaps are not there yet; those made of a token's own step cost about as much.
    gap_policy = "self" if reduction.gap_policy == "cached" else reduction.gap_policy
    found = [
        Kind(f"tell {', '.join(sorted(needs))}", telling, want=needs, whole=True),
        Kind("scan across gaps", aging, gap_policy=gap_policy),
        Kind("are told where tokens come from", placing),
    ]
    return [kind for kind in found if kind.layers]


def _times_as_long(net: Backbone, asked: Sequence[Kind], precision: Precision) -> list[float]:
    """Time a mixer plain and as each kind, on as many tokens as it started with."""
    mixer = cast(nn.Module, net.layers[asked[-1].layers[-1] - 1].mixer)
    device = next(mixer.parameters()).device
    x = torch.ones(BATCH, net.length, net.dim, device=device, requires_grad=True)
    tokens = Tokens.start(x, cls_index=net.info.cls_index)

    def run(*given: Tokens, **options: Any) -> None:
        with precision.autocast():
            returned = mixer(x, *given, **options)
        out: Tensor = returned[0] if given else returned
        torch.autograd.grad(out.float().sum(), x)

    runs: list[Run] = [run]
    for kind in asked:
        where = tokens._replace(grid=net.grid if kind.whole else None)
        runs.append(partial(run, where, want=kind.want, gap_policy=kind.gap_policy))
    plain, *others = _turns(runs, device)
    return [statistics.median(ratios(other, plain)) for other in others]


def _turns(runs: Sequence[Run], device: torch.device) -> list[Times]:
    """Time runs in turns that are long enough for the first.

    Returns:
        Milliseconds of a turn for each round, of which the first has single calls.
    """
    timed = partial(interleave, device=device, alone=True)
    first = timed(dict(enumerate(runs)), rounds=1, warmup=1)
    repeats = math.ceil(TURN_MS / first[0][0])
    turns = {key: partial(_repeat, run, repeats) for key, run in enumerate(runs)}
    more = timed(turns, rounds=(FEW if repeats == 1 else MANY) - 1, warmup=0)
    return [first[key] + more[key] for key in turns]


def _repeat(run: Run, times: int) -> None:
    for _ in range(times):
        run()


def _listed(layers: Sequence[int]) -> str:
    """Write 10, 20 or 11-24."""
    first, last = layers[0], layers[-1]
    whole = len(layers) > 2 and list(layers) == list(range(first, last + 1))
    return f"{first}-{last}" if whole else ", ".join(map(str, layers))
