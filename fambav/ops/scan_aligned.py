"""Selective scan with hidden-state alignment: removed tokens still decay the state.

With skipped_dt[t] the summed step sizes of the tokens removed just before token t,

    h[t] = exp((delta[t] + skipped_dt[t]) A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] h[t] + D u[t]

which is the plain scan of step sizes delta' = delta + skipped_dt and inputs u delta / delta': their
product, which enters the state, is unchanged.

Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", arXiv:2409.18962,
hidden state alignment; the reduction to a plain scan is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.ops.cross_scan import select_rows
from fambav.ops.dispatch import expect, expect_beside
from fambav.ops.match import others
from fambav.ops.selective_scan import selective_scan
from fambav.registry import GAP_POLICIES, nearest

# Added to every step size, so that none is 0 and gradients are right there too.  It is far below
# the rounding of the decay, and the input of the state does not depend on it.
_LEAST_STEP = 1e-30


def aligned_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    skipped_dt: Tensor | None,
    *,
    reverse: bool = False,
) -> Tensor:
    """Scan kept tokens, with the decay of those removed between them.

    With `skipped_dt` everything is computed in float32 (float64 if u is) and rounded once.

    Args:
        u: Input, (batch, length, dim).
        delta: Step size after bias and softplus, shaped like u, at least 0.
        A: Decay rate, (dim, state), real.
        B: Input matrix, (batch, length, state).
        C: Output matrix, shaped like B.
        D: Skip weight, (dim,), or None for no skip.
        skipped_dt: Summed step sizes of the tokens removed between each token and the one scanned
            before it, shaped like u, at least 0; None for a plain scan.  That of the token scanned
            first has no effect.
        reverse: Scan from the last token to the first.

    Returns:
        y, with the shape and dtype of u.

    Raises:
        ValueError: If a shape, dtype or device does not fit the others.
        BackendError: If a backend of the scan is forced that cannot run these tensors.

    Source: Zhan et al., arXiv:2409.18962, hidden state alignment.
    """
    _check(u, delta, A, B, C, D, skipped_dt)
    if skipped_dt is None:
        plain = selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, reverse=reverse)
        return plain.mT
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    whole_dt = dt + skipped_dt.to(dtype) + _LEAST_STEP
    y: Tensor = selective_scan(
        (x * (dt / whole_dt)).mT, whole_dt.mT, A, B.mT, C.mT, reverse=reverse
    ).mT
    return (y if D is None else y + D.to(dtype) * x).to(u.dtype)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    skipped_dt: Tensor | None,
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
    if skipped_dt is not None:
        expect_beside("skipped_dt", skipped_dt, u.shape, u)


def count_skipped(position: Tensor, *, reverse: bool = False) -> Tensor:
    """Count the tokens removed between each token and the one scanned before it.

    Args:
        position: Indices of the tokens in the whole sequence, ascending, (batch, length), int64.
        reverse: Whether the scan goes from the last token to the first.

    Returns:
        (batch, length), int64; 0 for the token scanned first, which no state precedes.
    """
    removed = position.diff(dim=1) - 1  # (batch, length - 1)
    return F.pad(removed, (0, 1) if reverse else (1, 0))


def estimate_skipped_dt(
    policy: str,
    *,
    delta: Tensor,
    skipped: Tensor,
    bias: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | None:
    """Estimate the step sizes of removed tokens from their number.

    Args:
        policy: The step size of every removed token:
            bias         that of the layer's bias alone
            hold_prev    that of the token scanned before it
            self         that of the token scanned after it
            none         none: kept tokens become neighbours
        delta: Step size after bias and softplus, (batch, length, dim).
        skipped: Tokens removed before each token in the direction of the scan, (batch, length).
        bias: Added to the step size before softplus, (dim,); only "bias" needs it.
        reverse: Whether the scan goes from the last token to the first.

    Returns:
        skipped_dt for `aligned_scan`, shaped like delta, float32 (float64 if delta is); None under
        "none".

    Raises:
        ValueError: If the policy is unknown or is "cached", which estimates nothing, if it needs a
            bias and there is none, or if a shape does not fit that of delta.
    """
    if policy == "cached":
        raise ValueError(
            "policy is 'cached', expected one that estimates step sizes; give aligned_scan those"
            " that the tokens carry"
        )
    if policy not in GAP_POLICIES:
        raise ValueError(
            f"policy is {policy!r}, expected a known name; {nearest(policy, GAP_POLICIES)}"
        )
    if policy == "none":
        return None
    expect("skipped", skipped, delta.shape[:2])
    dtype = torch.promote_types(delta.dtype, torch.float32)
    dt = delta.to(dtype)
    if policy == "bias":
        if bias is None:
            raise ValueError("bias is None, expected (dim,) under the policy 'bias'")
        expect("bias", bias, delta.shape[2:])
        dt = F.softplus(bias.to(dtype))
    elif policy == "hold_prev":  # the token scanned first has its own
        pair = (dt[:, 1:], dt[:, -1:]) if reverse else (dt[:, :1], dt[:, :-1])
        dt = torch.cat(pair, dim=1)
    return skipped.to(dtype)[..., None] * dt


def carry_skipped_dt(
    delta: Tensor, skipped_dt: Tensor | None, keep: Tensor, order: Tensor
) -> Tensor:
    """Add the step sizes of removed tokens to the kept token scanned next.

    A removed token passes on its own step size and the skipped_dt before it.  Those before the
    first kept token or after the last are dropped: no state decays there.  Each sum has a fixed
    order, and none is a difference of larger sums.

    Args:
        delta: Step size after bias and softplus, (batch, length, dim).
        skipped_dt: Summed step sizes of the tokens removed earlier, just before each token in the
            direction of the scan, shaped like delta; None if none has been.
        keep: Indices of the kept tokens, in their new order, distinct, (batch, kept), int64.
        order: Indices of all tokens in scan order, (batch or 1, length), int64.

    Returns:
        The skipped_dt of each kept token, (batch, kept, dim), float32 (float64 if delta is), with
        gradients for delta and skipped_dt.

    Raises:
        ValueError: If a shape does not fit that of delta.
    """
    batch, length, _ = delta.shape
    if skipped_dt is not None:
        expect("skipped_dt", skipped_dt, delta.shape)
    expect("keep", keep, (batch, keep.shape[-1]))
    expect("order", order, (1 if order.shape[0] == 1 else batch, length))
    dtype = torch.promote_types(delta.dtype, torch.float32)
    removed, receiver = _receivers(keep, order.expand(batch, -1))

    moved = select_rows(delta.to(dtype), removed)  # (batch, removed, dim)
    kept = moved.new_zeros(*keep.shape, delta.shape[2])
    if skipped_dt is not None:
        earlier = skipped_dt.to(dtype)
        moved, kept = moved + select_rows(earlier, removed), select_rows(earlier, keep)
    padded = F.pad(kept, (0, 0, 0, 1))  # one more row for those that are dropped
    sample = torch.arange(batch, device=receiver.device)[:, None]
    return padded.index_put((sample, receiver), moved, accumulate=True)[:, :-1]


def _receivers(keep: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return the removed indices, ascending, and which of `keep` is scanned next after each.

    The latter indexes `keep` and is its length where none follows or precedes.
    """
    kept = keep.shape[1]
    removed = others(keep, order.shape[1])
    step = order.argsort(dim=1)  # at which each token is scanned
    steps, receivers = step.gather(1, keep).sort(dim=1)
    nobody = torch.full_like(removed[:, :1], kept)
    receivers = torch.cat((nobody, receivers[:, 1:], nobody), dim=1)
    following = torch.searchsorted(steps, step.gather(1, removed))
    return removed, receivers.gather(1, following)
