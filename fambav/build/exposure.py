"""What it costs that mixers tell what they compute, or scan across gaps: measured before training.

A fused mixer keeps step sizes and scan outputs to itself.  A reduction that reads them, or lets the
state age over tokens that went, makes some mixers run composed of single scans.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fambav.engine.runtime import Precision
from fambav.engine.timing import interleave, ratio
from fambav.layers import Ask, Tokens
from fambav.models import Isotropic

BATCH, ROUNDS = 8, 3


def exposure(net: Isotropic, precision: Precision) -> str | None:
    """Say which mixers of a model are composed, why, and how much longer they take.

    Args:
        net: On the device it will run on.
        precision: Of the forward pass.

    Returns:
        A line; None if all mixers run fused.
    """
    reduction = net.reduction
    asked = [n for n in range(net.depth) if reduction.hooks(n).asked]
    if not asked:
        return None
    telling = [n + 1 for n in asked if reduction.hooks(n).needs]
    aging = [n + 1 for n in asked if reduction.hooks(n).gap is not None]
    reasons = []
    if telling:
        needs = ", ".join(sorted(reduction.needs))
        reasons.append(f"tell {needs} at layers {_listed(telling)}")
    if aging:
        reasons.append(f"scan across gaps at layers {_listed(aging)}")
    if not reasons:
        reasons.append(
            f"are told where tokens come from at layers {_listed([n + 1 for n in asked])}"
        )
    times = _times_as_long(net, asked[-1], precision)
    return (
        f"{reduction.name}: mixers {' and '.join(reasons)}; such a one takes {times:.1f} times as "
        f"long as one that is not asked (measured, forward and backward)"
    )


def _times_as_long(net: Isotropic, layer: int, precision: Precision) -> float:
    """Time a mixer both ways, on as many tokens as it started with."""
    mixer = cast(nn.Module, net.layers[layer].mixer)
    hooks, device = net.reduction.hooks(layer), next(mixer.parameters()).device
    x = torch.ones(BATCH, net.length, net.dim, device=device, requires_grad=True)
    tokens = Tokens.start(x, class_places=net.body.class_places)
    # Carried gaps are not there yet; those made of a token's own step cost about as much.
    ask = Ask(tokens, hooks.needs, "self" if hooks.gap == "cached" else hooks.gap)

    def run(*asking: Ask) -> None:
        with precision.autocast():
            answer = mixer(x, *asking)
        out: Tensor = answer[0] if asking else answer
        torch.autograd.grad(out.float().sum(), x)

    runs = {"fused": run, "composed": lambda: run(ask)}
    times = interleave(runs, rounds=ROUNDS, warmup=1, device=device)
    return ratio(times["composed"], times["fused"]) or 1.0


def _listed(layers: list[int]) -> str:
    """Write 10, 20 or 11-24."""
    first, last = layers[0], layers[-1]
    whole = len(layers) > 2 and layers == list(range(first, last + 1))
    return f"{first}-{last}" if whole else ", ".join(map(str, layers))
