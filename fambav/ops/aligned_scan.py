"""Selective scan of some tokens of a sequence, as far apart as they were in the whole of it.

A token that is gone gives nothing, but the state still decays for as long as it would have taken.
With G[t] the summed step size of the tokens gone just before token t,

    h[t] = exp((delta[t] + G[t]) A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] h[t] + D u[t]

which is the plain scan of step sizes delta + G and inputs u delta / (delta + G): the product of
both, what goes into the state, is as before.

Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", arXiv:2409.18962,
hidden state alignment; that a plain scan does it is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.ops.dispatch import expect, expect_beside
from fambav.ops.match import others
from fambav.ops.selective_scan import selective_scan
from fambav.registry import GAP_POLICIES, nearest

# Added to every step size, so that none is 0 and its gradients are right there too.  The decay does
# not notice it, and what goes into the state does not depend on it.
_LEAST_STEP = 1e-30


def aligned_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gap: Tensor | None,
    *,
    reverse: bool = False,
) -> Tensor:
    """Scan tokens across the gaps that others have left.

    With a gap everything is computed in float32 (float64 if u is) and rounded once, at the end.

    Args:
        u: Input, (batch, length, dim).
        delta: Step size after bias and softplus, shaped like u, at least 0.
        A: Decay rate, (dim, state), real.
        B: Input weight, (batch, length, state).
        C: Output weight, shaped like B.
        D: Skip weight, (dim,), or None for no skip.
        gap: Summed step sizes of the tokens gone between each token and the one scanned before it,
            shaped like u, at least 0; None for a plain scan.  That of the token scanned first
            changes nothing.
        reverse: Scan from the last token to the first.

    Returns:
        y, with the shape and dtype of u.

    Raises:
        ValueError: If a shape, dtype or device does not fit the others.
        BackendError: If a backend of the scan is forced that cannot run these tensors.
    """
    _check(u, delta, A, B, C, D, gap)
    if gap is None:
        plain = selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, reverse=reverse)
        return plain.mT
    wide = torch.promote_types(u.dtype, torch.float32)
    x, step = u.to(wide), delta.to(wide)
    whole = step + gap.to(wide) + _LEAST_STEP
    y: Tensor = selective_scan(
        (x * (step / whole)).mT,
        whole.mT,
        A.to(wide),
        B.to(wide).mT,
        C.to(wide).mT,
        reverse=reverse,
    ).mT
    return (y if D is None else y + D.to(wide) * x).to(u.dtype)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gap: Tensor | None,
) -> None:
    if u.dim() != 3 or u.shape[1] < 1:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (batch, length >= 1, dim)")
    (batch, length, dim), state = u.shape, A.shape[-1]
    expect_beside("delta", delta, u.shape, u)
    expect_beside("A", A, (dim, state), u)
    for name, weight in (("B", B), ("C", C)):
        expect_beside(name, weight, (batch, length, state), u)
    if D is not None:
        expect_beside("D", D, (dim,), u)
    if gap is not None:
        expect_beside("gap", gap, u.shape, u)


def skipped(position: Tensor, *, reverse: bool = False) -> Tensor:
    """Count the tokens gone between each token and the one scanned before it.

    Args:
        position: Places of the tokens in the whole sequence, ascending, (batch, length), int64.
        reverse: Whether the scan goes from the last token to the first.

    Returns:
        (batch, length), int64; 0 for the token scanned first, before which there is no state.
    """
    gone = position.diff(dim=1) - 1
    return F.pad(gone, (0, 1) if reverse else (1, 0))


def steps_between(
    policy: str,
    *,
    delta: Tensor,
    skipped: Tensor,
    bias: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | None:
    """Estimate the step sizes of tokens that no longer exist from how many they are.

    Args:
        policy: What every token that is gone would have taken,
            bias         the step size of the layer's bias alone
            hold_prev    the step size of the token scanned before it
            self         the step size of the token scanned after it
            none         nothing, so that those left are neighbours
        delta: Step size after bias and softplus, (batch, length, dim).
        skipped: Tokens gone before each token in the direction of the scan, (batch, length).
        bias: Added to the step size before softplus, (dim,); only "bias" needs it.
        reverse: Whether the scan goes from the last token to the first.

    Returns:
        The gap for `aligned_scan`, shaped like delta, float32 (float64 if delta is); None under
        "none".

    Raises:
        ValueError: If the policy is unknown or is "cached", which estimates nothing, if it needs a
            bias and there is none, or if a shape does not fit that of delta.
    """
    if policy == "cached":
        raise ValueError(
            "policy is 'cached', expected one that estimates step sizes; give aligned_scan the gap"
            " that the tokens carry, Tokens.gap"
        )
    if policy not in GAP_POLICIES:
        raise ValueError(
            f"policy is {policy!r}, expected a known name; {nearest(policy, GAP_POLICIES)}"
        )
    if policy == "none":
        return None
    expect("skipped", skipped, delta.shape[:2])
    wide = torch.promote_types(delta.dtype, torch.float32)
    each = delta.to(wide)
    if policy == "bias":
        if bias is None:
            raise ValueError("bias is None, expected (dim,) under the policy 'bias'")
        expect("bias", bias, delta.shape[2:])
        each = F.softplus(bias.to(wide))
    elif policy == "hold_prev":
        each = _scanned_before(each, reverse=reverse)
    return skipped.to(wide)[..., None] * each


def _scanned_before(x: Tensor, *, reverse: bool) -> Tensor:
    """Give every token what the one scanned before it has; the first one has its own."""
    parts = (x[:, 1:], x[:, -1:]) if reverse else (x[:, :1], x[:, :-1])
    return torch.cat(parts, dim=1)


def hand_over(delta: Tensor, gap: Tensor | None, keep: Tensor, order: Tensor) -> Tensor:
    """Give the step sizes of tokens that go to the kept token scanned next.

    A token that goes hands over its own step size and the gap before it.  Those that go before the
    first kept token or after the last are forgotten: no state decays there.  Each sum is made in an
    order that is fixed, without differences of larger sums.

    Args:
        delta: Step size after bias and softplus, (batch, length, dim).
        gap: Summed step sizes of the tokens gone just before each token in the direction of the
            scan, shaped like delta; None if none is gone yet.
        keep: Places of the tokens that stay, in their new order, distinct, (batch, kept), int64.
        order: Places of all tokens in the order they are scanned, (batch or 1, length), int64.

    Returns:
        The gap before each kept token, (batch, kept, dim), float32 (float64 if delta is), with
        gradients for delta and gap.

    Raises:
        ValueError: If a shape does not fit that of delta.
    """
    batch, length, _ = delta.shape
    if gap is not None:
        expect("gap", gap, delta.shape)
    expect("keep", keep, (batch, keep.shape[-1]))
    expect("order", order, (1 if len(order) == 1 else batch, length))
    wide = torch.promote_types(delta.dtype, torch.float32)
    gone, into = _receivers(keep, order.expand(batch, -1))

    steps = delta.to(wide)
    moved = _rows(steps, gone)
    kept = moved.new_zeros(*keep.shape, delta.shape[2])
    if gap is not None:
        before = gap.to(wide)
        moved, kept = moved + _rows(before, gone), _rows(before, keep)
    spare = F.pad(kept, (0, 0, 0, 1))  # one row more for what is forgotten
    sample = torch.arange(batch, device=into.device)[:, None]
    return spare.index_put((sample, into), moved, accumulate=True)[:, :-1]


def _receivers(keep: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places that go, ascending, and which of `keep` is scanned next after each.

    The latter counts along `keep` and is the number of kept tokens if no one takes over.
    """
    kept = keep.shape[1]
    gone = others(keep, order.shape[1])
    time = order.argsort(dim=1)  # when each place is scanned
    times, takers = time.gather(1, keep).sort(dim=1)
    nobody = torch.full_like(gone[:, :1], kept)
    takers = torch.cat((nobody, takers[:, 1:], nobody), dim=1)
    after = torch.searchsorted(times, time.gather(1, gone))
    return gone, takers.gather(1, after)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Take (batch, n) places along the tokens of x, (batch, length, dim)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
