"""How much tokens matter and which of them are alike, as a method reads it from the mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.layers import Tokens
from fambav.ops.match import others
from fambav.reduction.reducer import chosen

READ = {
    "gated": frozenset({"y", "z"}),
    "ungated": frozenset({"y"}),
    "mixed": frozenset({"mixed"}),
}
_ENDS = {"both": slice(None), "forward": slice(0, None, 2), "backward": slice(1, None, 2)}


def read_importance(signal: str, directions: str) -> frozenset[str]:
    """Return which fields of `Signals` `importance` reads with these options.

    Raises:
        ValueError: If one is unknown, or both do not go together.
    """
    chosen("signal", signal, tuple(READ))
    chosen("directions", directions, tuple(_ENDS))
    if signal == "mixed" and directions != "both":
        raise ValueError(
            f"reduction option directions is {directions!r}, expected 'both' with signal=mixed, in"
            " which the directions are one sum"
        )
    return READ[signal]


def importance(
    tokens: Tokens, *, signal: str = "gated", directions: str = "both", clip: bool = True
) -> Tensor:
    """Sum what the last mixer says of each token over channels and directions.

    score[j] = sum over directions and channels of max(0, y[j]), each y in the order of the tokens

    Args:
        tokens: With the `signals` that `read_importance` names.
        signal: y is "gated", the scan's output times the gate; "ungated", the scan's output alone;
            "mixed", the output of the mixer.
        directions: "both", or the scans that run "forward" or "backward" alone.
        clip: Leave negative numbers out.

    Returns:
        (batch, length), float32 (float64 if the signals are), without a gradient.

    Raises:
        ValueError: If the signals are not there.

    Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", arXiv:2409.18962,
    token importance evaluation.
    """
    if signal == "mixed":
        y = _wide(told(tokens, "mixed"))
    else:
        y = _wide(told(tokens, "y")[:, _ENDS[directions]])
        if signal == "gated":
            y = y * F.silu(_wide(told(tokens, "z")))[:, None]
    total = (y.clamp(min=0) if clip else y).sum(dim=-1)
    return total if signal == "mixed" else total.sum(dim=1)


def ranked(score: Tensor, class_places: Tensor) -> Tensor:
    """Return the places of the patches by score, the highest first.

    Of equal scores the lower place comes first.  Class tokens are in no rank, whatever they score.

    Args:
        score: (batch, length).
        class_places: (batch, k), int64.

    Returns:
        (batch, length - k), int64.
    """
    patches = others(class_places, score.shape[1])
    order = score.gather(1, patches).sort(dim=1, descending=True, stable=True).indices
    return patches.gather(1, order)


def most_alike(x: Tensor, places: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Find for some tokens which of some others is most like each, by cosine.

    Compared in float64, which no setting of a product's precision touches.  Of equally like ones
    the lower place wins.  A token of zeros is equally unlike all.

    Args:
        x: Features, (batch, length, dim).
        places: Tokens to find one for, (batch, n), int64.
        among: Tokens it may be, (batch, m >= 1), int64.

    Returns:
        The cosines, (batch, n), float64, and the places found, (batch, n), int64.
    """
    among = among.sort(dim=1).values
    mine, theirs = (of_length_1(rows(x, some)) for some in (places, among))
    cosine, best = (mine @ theirs.mT).max(dim=2)
    return cosine, among.gather(1, best)


def of_length_1(x: Tensor) -> Tensor:
    """Scale features to length 1, in float64 and without a gradient; zeros stay."""
    return F.normalize(x.detach().double(), dim=-1, eps=1e-30)


def rows(x: Tensor, places: Tensor) -> Tensor:
    """Take (batch, n) places along the tokens of x, (batch, length, dim)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def told(tokens: Tokens, name: str) -> Tensor:
    """Return a field of the signals.

    Raises:
        ValueError: If the mixer was not asked for it.
    """
    signal: Tensor | None = None if tokens.signals is None else getattr(tokens.signals, name)
    if signal is None:
        raise ValueError(f"signals have no {name}, expected it from the mixer before the reduction")
    return signal


def _wide(signal: Tensor) -> Tensor:
    return signal.detach().to(torch.promote_types(signal.dtype, torch.float32))
