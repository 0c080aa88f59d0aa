"""Selective scan with hidden-state alignment: removed tokens still decay the state.

With skipped_dt[t] the summed step sizes of the tokens removed just before token t,

    h[t] = exp((delta[t] + skipped_dt[t]) A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] h[t] + D u[t]

The Triton and numba scans add it to the exponent.  Composed, it is the plain scan of step sizes
delta' = delta + skipped_dt and inputs u delta / delta': their product, which enters the state, is
unchanged.

Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", arXiv:2409.18962,
hidden state alignment; the reduction to a plain scan is ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.ops.cross_scan import select_rows
from fambav.ops.dispatch import SCAN, Backend, Table, expect, expect_beside
from fambav.ops.kernels import NUMBA, TRITON, KernelSet, on_gpu
from fambav.ops.match import others
from fambav.ops.selective_scan import fused_scan, fused_unsupported, selective_scan
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
    skipped_dt: Tensor | None = None,
    skipped: Tensor | None = None,
    *,
    gap_policy: str = "bias",
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_dt: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scan kept tokens, with the decay of those removed between them.

    Args:
        u: Input, (batch, length, dim).
        delta: Step size before bias and softplus, shaped like u.
        A: Decay rate, (dim, state), real.
        B: Input matrix, (batch, length, state).
        C: Output matrix, shaped like B.
        D: Skip weight, (dim,), or None for no skip.
        skipped_dt: Summed step sizes of the tokens removed between each token and the one scanned
            before it, shaped like u, at least 0; without effect for the token scanned first.
        skipped: The number of these tokens instead, (batch, length).
        gap_policy: The step size of each of them, as in `estimate_skipped_dt`.
        delta_bias: Added to delta before softplus, (dim,), or None.
        delta_softplus: Whether delta goes through softplus; else it is at least 0.
        reverse: Scan from the last token to the first.
        return_dt: Whether to return the step size as well.

    Returns:
        y, with the shape and dtype of u, rounded once, and with `return_dt` the step size after
        softplus, shaped like u, float32 (float64 if u is), else None.

    Raises:
        ValueError: If a shape, dtype or device does not fit the others, or the policy is unknown.
        BackendError: If a backend of the scan is forced that cannot run these tensors.

    Source: Zhan et al., arXiv:2409.18962, hidden state alignment.
    """
    _check(u, delta, A, B, C, {"D": D, "delta_bias": delta_bias})
    gap_policy = policy_of(gap_policy, skipped, skipped_dt, shape=u.shape, first=u)
    skipped = None if skipped is None or gap_policy == "none" else skipped.float()
    if gap_policy == "bias" and (delta_bias is None or not delta_softplus):
        raise ValueError("gap_policy is 'bias', expected delta_bias and delta_softplus with it")
    if gap_policy == "none" and not return_dt:
        options = dict(delta_bias=delta_bias, delta_softplus=delta_softplus, reverse=reverse)
        return _plain(u, delta, A, B, C, D, **options), None
    run = ALIGNED_SCAN.pick(u, A, B[:, :, None], C[:, :, None])
    y, dt = run(
        *(u, delta, A, B, C, D, delta_bias),
        **dict(skipped=skipped, skipped_dt=skipped_dt, gap_policy=gap_policy),
        **dict(softplus=delta_softplus, reverse=reverse, return_dt=return_dt),
    )
    return y, dt if return_dt else None


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    channels: dict[str, Tensor | None],
) -> None:
    if u.dim() != 3 or u.shape[1] < 1:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (batch, length >= 1, dim)")
    (batch, length, dim), state = u.shape, A.shape[-1]
    expect_beside("delta", delta, u.shape, u)
    expect_beside("A", A, (dim, state), u)
    for name, weight in (("B", B), ("C", C)):
        expect_beside(name, weight, (batch, length, state), u)
    for name, tensor in channels.items():
        if tensor is not None:
            expect_beside(name, tensor, (dim,), u)


def policy_of(
    policy: str,
    skipped: Tensor | None,
    skipped_dt: Tensor | None,
    *,
    shape: tuple[int, ...],
    first: Tensor,
) -> str:
    """Check what a scan is given of its gaps.

    Args:
        policy: The step size of a token that `skipped` counts.
        skipped: Shaped like `shape` without its last axis, or None.
        skipped_dt: Of that shape, or None.
        shape: Of the step sizes.
        first: Another argument of the scan, whose device counts.

    Returns:
        How its state ages: by the policy, "cached" with `skipped_dt`, "none" with neither.

    Raises:
        ValueError: If the policy is unknown or estimates nothing, or a shape or device does not
            fit.
    """
    if policy not in GAP_POLICIES:
        hint = nearest(policy, GAP_POLICIES)
        raise ValueError(f"gap_policy is {policy!r}, expected a known name; {hint}")
    if skipped is None and skipped_dt is None:
        return "none"
    if skipped is not None and skipped_dt is not None:
        raise ValueError("skipped_dt is given beside skipped, expected one of them")
    if skipped_dt is not None:
        expect_beside("skipped_dt", skipped_dt, shape, first)
        return "cached"
    given = cast(Tensor, skipped)
    if policy == "cached":
        raise ValueError("gap_policy is 'cached', expected skipped_dt or one that estimates it")
    expect("skipped", given, shape[:-1])
    if given.device != first.device:
        raise ValueError(f"skipped is on {given.device}, expected {first.device}")
    return policy


def _plain(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, **options: Any
) -> Tensor:
    y: Tensor = selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, **options)
    return y.mT


def _fused(
    kernels: KernelSet,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    *,
    skipped_dt: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    by_channel = u.mT, delta.mT, A, B.mT[:, None], C.mT[:, None], D, None, bias
    far = None if skipped_dt is None else skipped_dt.mT
    y, _, dt = fused_scan(kernels, *by_channel, skipped_dt=far, out_dtype=u.dtype, **options)
    return y.mT, dt.mT if options["return_dt"] else dt


def _composed(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    *,
    skipped: Tensor | None,
    skipped_dt: Tensor | None,
    gap_policy: str,
    softplus: bool,
    reverse: bool,
    return_dt: bool,
) -> tuple[Tensor, Tensor]:
    del return_dt
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    dt = dt if bias is None else dt + bias.to(dtype)
    dt = F.softplus(dt) if softplus else dt
    if skipped is not None:
        skipped_dt = estimate_skipped_dt(
            gap_policy, delta=dt, skipped=skipped, bias=bias, reverse=reverse
        )
    scanned, whole_dt = x, dt
    if skipped_dt is not None:
        whole_dt = dt + skipped_dt.to(dtype) + _LEAST_STEP
        scanned = x * (dt / whole_dt)
    y: Tensor = selective_scan(scanned.mT, whole_dt.mT, A, B.mT, C.mT, reverse=reverse).mT
    return (y if D is None else y + D.to(dtype) * x).to(u.dtype), dt


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


ALIGNED_SCAN = Table(
    "aligned_scan",
    Backend(
        "triton",
        partial(_fused, TRITON),
        partial(fused_unsupported, TRITON),
        TRITON.unavailable,
        default=on_gpu,
    ),
    Backend("numba", partial(_fused, NUMBA), partial(fused_unsupported, NUMBA), NUMBA.unavailable),
    Backend("reference", _composed),
    follows=SCAN,
)
