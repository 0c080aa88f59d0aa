"""Which mixers of a reduced model cannot run fused, and why, for a line at the start of a run.

A fused mixer keeps step sizes and scan outputs to itself.  A reduction that reads them, or lets the
state decay over removed tokens, makes some mixers run as single scans.  Of a model that scans a
grid, mixers behind a reduction receive positions, which they look up unless a whole grid remains.
`fambav bench reduction` measures the cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from fambav.layers import OUTPUT
from fambav.reduction import Reduction


def unfused_line(reduction: Reduction) -> str | None:
    """Return a line on the mixers that do more than a plain one; None if there are none."""
    reasons = unfused_layers(reduction)
    if not reasons:
        return None
    text = " and ".join(f"{why} at layers {_ranges(layers)}" for why, layers in reasons.items())
    return (
        f"{reduction.name}: mixers {text}, which may take longer than a plain mixer; fambav bench "
        "reduction measures by how much"
    )


def unfused_layers(reduction: Reduction) -> dict[str, list[int]]:
    """Return layers, from 1, by what their mixers do; one that has two reasons counts in both."""
    schedule, info = reduction.schedule, reduction.info
    hooks = {layer + 1: reduction.hooks(layer) for layer in range(info.depth)}
    # There are gaps only behind removed tokens; a scan across gaps reads all positions anyway.
    gapped = [layer for layer in hooks if schedule.lengths[layer - 1] < schedule.start]
    reasons = {
        f"return {', '.join(sorted(reduction.needs - OUTPUT))}": [
            layer for layer, hook in hooks.items() if hook.want - OUTPUT
        ],
        "scan across gaps": [layer for layer, hook in hooks.items() if hook.gap_policy is not None],
        "receive positions of tokens": [
            layer for layer in gapped if info.needs_positions and hooks[layer].gap_policy is None
        ],
    }
    return {why: layers for why, layers in reasons.items() if layers}


def _ranges(layers: Sequence[int]) -> str:
    """Format as 10, 20 or 11-24."""
    first, last = layers[0], layers[-1]
    whole = len(layers) > 2 and list(layers) == list(range(first, last + 1))
    return f"{first}-{last}" if whole else ", ".join(map(str, layers))
