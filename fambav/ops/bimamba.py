"""The bidirectional Mamba mixer between its projections, as one operation.

    x, z = xz        u = silu(conv(x))        dt, B, C = x_proj(u)
    y = scan(u, softplus(dt_proj(dt) + bias), A, B, C, D)        the same from the other end
    out = out_proj((y + y of the other direction) * silu(z))

Behind removed tokens the state ages over them: their step sizes add to the exponent of the decay,
as in `scan_aligned`.  The Triton and numba backends are one operator, see `fused_bimamba`.

Source: Zhu et al., "Vision Mamba", arXiv:2401.09417, algorithm 1; Gu and Dao, "Mamba",
arXiv:2312.00752, figure 3.  Gating the sum instead of each direction is the same by algebra.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.arguments import is_number, refusal
from fambav.ops.causal_conv1d import causal_conv1d
from fambav.ops.dispatch import (
    SCAN,
    Backend,
    Table,
    autocasts,
    expect_beside,
    expect_tensors,
    without_autocast,
)
from fambav.ops.fused_bimamba import SCORES, Direction, fused_bimamba
from fambav.ops.kernels import NUMBA, TRITON, on_gpu
from fambav.ops.scan_aligned import aligned_scan, policy_of
from fambav.registry import nearest

ScanInputs = tuple[Tensor, Tensor, Tensor, Tensor]
RETURNED = frozenset({"delta", "B", "C", *SCORES})


@overload
def bimamba_scan(
    xz: Tensor,
    forward: Direction,
    backward: Direction,
    out_proj: Tensor | None = ...,
    skipped: Tensor | None = ...,
    skipped_dt: Tensor | None = ...,
    *,
    scale: float = ...,
    gap_policy: str = ...,
    log_A: bool = ...,
) -> Tensor: ...


@overload
def bimamba_scan(
    xz: Tensor,
    forward: Direction,
    backward: Direction,
    out_proj: Tensor | None = ...,
    skipped: Tensor | None = ...,
    skipped_dt: Tensor | None = ...,
    *,
    scale: float = ...,
    gap_policy: str = ...,
    log_A: bool = ...,
    want: Collection[str],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def bimamba_scan(
    xz: Tensor,
    forward: Direction,
    backward: Direction,
    out_proj: Tensor | None = None,
    skipped: Tensor | None = None,
    skipped_dt: Tensor | None = None,
    *,
    scale: float = 1.0,
    gap_policy: str = "bias",
    log_A: bool = False,
    want: Collection[str] | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Convolve, scan in both directions, add, gate and project.

    Nothing is flipped or transposed in memory.  The state is float32, or float64 if xz is.

    Args:
        xz: Input x and gate z, concatenated, (batch, length, 2 dim), of any floating-point dtype;
            the batch may be empty.
        forward: Parameters of the scan from the first token to the last.
        backward: Parameters of the scan from the last token to the first.
        out_proj: Applied to the result, (out, dim); None for none.
        skipped: Number of tokens removed between each token and the one scanned before it, by
            direction, (2, batch, length), any dtype; without effect for the token scanned first.
        skipped_dt: Their step sizes, summed, (2, batch, length, dim), at least 0.
        scale: Factor of the sum; 0.5 takes the mean of both directions.
        gap_policy: The step size of a removed token, see `estimate_skipped_dt`; "cached" goes with
            `skipped_dt`, all others with `skipped`.
        log_A: Whether A of each direction is given as the logarithm of its negative.
        want: What to return beside the result, float32, or float64 if xz is, but for B and C:
            gated       sum over channels of max(0, y silu(z)), (2, batch, length)
            ungated     the same of max(0, y)
            gated_unclipped, ungated_unclipped      the same without max; one of these four at most
            B, C        (2, batch, length, state), in the dtype of the result
            delta       step size after bias and softplus, (2, batch, length, dim)

    Returns:
        (batch, length, out), or (batch, length, dim) without out_proj, in xz's dtype, or that of
        autocast; unless `want` is None also a dictionary of what it names, in the order of the
        tokens, in which delta alone has a gradient.

    Raises:
        ValueError: If a shape, dtype or device does not fit the others, or a name is unknown.
        BackendError: If a backend is forced that cannot run these tensors.

    Source: Zhu et al., arXiv:2401.09417, algorithm 1; Zhan et al., arXiv:2409.18962, for gaps.
    """
    _check(xz, forward, backward, out_proj)
    _check_options(scale, want or ())
    shape = 2, *xz.shape[:2], xz.shape[2] // 2
    gap_policy = policy_of(gap_policy, skipped, skipped_dt, shape=shape, first=xz)
    skipped = None if skipped is None or gap_policy == "none" else skipped.float()
    if autocasts(xz):
        xz = xz.to(torch.get_autocast_dtype(xz.device.type))
    run = BIMAMBA_SCAN.pick(xz, *forward, *backward)
    tensors = xz, forward, backward, out_proj, skipped, skipped_dt
    with without_autocast(xz):
        y, more = run(*tensors, scale=scale, gap_policy=gap_policy, log_A=log_A, want=want or ())
    return y if want is None else (y, {name: more[name] for name in want})


def _check_options(scale: float, want: Collection[str]) -> None:
    if not is_number(scale):
        raise refusal("scale", scale, "a number")
    for name in want:
        if name not in RETURNED:
            raise ValueError(f"want is {name!r}, expected a known name; {nearest(name, RETURNED)}")
    scores = [name for name in want if name in SCORES]
    if len(scores) > 1:
        raise ValueError(f"want is {' and '.join(scores)}, expected one score at most")


def _cast(direction: Direction, dtype: torch.dtype) -> Direction:
    """Cast projections to the dtype of the tokens, and parameters of the scan to its state's."""
    state_dtype = torch.promote_types(dtype, torch.float32)
    return direction._replace(
        x_proj=direction.x_proj.to(dtype),
        dt_proj=direction.dt_proj.to(dtype),
        dt_bias=direction.dt_bias.to(state_dtype),
        A=direction.A.to(state_dtype),
        D=direction.D.to(state_dtype),
    )


def _check(xz: Tensor, forward: Direction, backward: Direction, out_proj: Tensor | None) -> None:
    expect_tensors(xz=xz)
    if xz.dim() != 3 or xz.shape[1] < 1 or xz.shape[2] % 2:
        raise ValueError(f"xz has shape {tuple(xz.shape)}, expected (batch, length >= 1, 2 dim)")
    expect_beside("xz", xz, xz.shape, xz)
    for end, direction in (("forward", forward), ("backward", backward)):
        if not isinstance(direction, Direction):
            raise refusal(end, direction, "a Direction")
    dim = xz.shape[2] // 2
    rank, state, width = (
        _second_axis(f"forward.{name}", getattr(forward, name))
        for name in ("dt_proj", "A", "conv_weight")
    )
    shapes = (
        *((dim, width), (dim,), (rank + 2 * state, dim), (dim, rank)),
        *((dim,), (dim, state), (dim,)),
    )
    for end, direction in (("forward", forward), ("backward", backward)):
        for name, tensor, shape in zip(Direction._fields, direction, shapes, strict=True):
            expect_beside(f"{end}.{name}", tensor, shape, xz)
    if out_proj is not None:
        _second_axis("out_proj", out_proj)
        expect_beside("out_proj", out_proj, (out_proj.shape[0], dim), xz)


def _second_axis(name: str, matrix: Tensor) -> int:
    """Return the length of a matrix's second axis."""
    expect_tensors(**{name: matrix})
    if matrix.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}, expected two axes")
    return matrix.shape[1]


def scan_inputs(x: Tensor, direction: Direction, *, reverse: bool) -> ScanInputs:
    """Compute what one direction scans.

    Args:
        x: (batch, length, dim).
        direction: Its parameters.
        reverse: Whether it goes from the last token to the first.

    Returns:
        u and delta before bias and softplus, (batch, length, dim), B and C, (batch, length, state).
    """
    u = causal_conv1d(x.mT, direction.conv_weight, direction.conv_bias, "silu", reverse=reverse).mT
    rank, state = direction.dt_proj.shape[1], direction.A.shape[1]
    dt, B, C = F.linear(u, direction.x_proj).split((rank, state, state), dim=-1)
    return u, F.linear(dt, direction.dt_proj), B, C


def token_score(y: Tensor, z: Tensor, name: str) -> Tensor:
    """Sum over the channels of each token.

    Args:
        y: Output of a scan, (..., length, dim).
        z: Gate before silu, broadcast to y.
        name: Of `SCORES`.

    Returns:
        (..., length), float32 (float64 if y is), without a gradient.
    """
    y, z = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (y, z))
    terms = y * F.silu(z) if SCORES[name]["gated"] else y
    return (terms.clamp(min=0) if SCORES[name]["clipped"] else terms).sum(dim=-1)


def _reference(
    xz: Tensor,
    forward: Direction,
    backward: Direction,
    out_proj: Tensor | None,
    skipped: Tensor | None,
    skipped_dt: Tensor | None,
    *,
    scale: float,
    gap_policy: str,
    log_A: bool,
    want: Collection[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    x, z = xz.chunk(2, dim=-1)
    forward, backward = (_cast(d, xz.dtype) for d in (forward, backward))
    if log_A:
        forward, backward = (d._replace(A=-d.A.exp()) for d in (forward, backward))
    each: list[tuple[Tensor, ...]] = []  # y, delta, B, C of a direction
    for end, d in enumerate((forward, backward)):
        reverse = bool(end)
        u, delta, B, C = scan_inputs(x, d, reverse=reverse)
        y, dt = aligned_scan(
            *(u, delta, d.A, B, C, d.D),
            None if skipped_dt is None else skipped_dt[end],
            None if skipped is None else skipped[end],
            gap_policy=gap_policy,
            delta_bias=d.dt_bias,
            delta_softplus=True,
            reverse=reverse,
            return_dt="delta" in want,
        )
        each.append((y, delta if dt is None else dt, B.detach(), C.detach()))
    ys, *others = zip(*each, strict=True)
    pairs = zip(("delta", "B", "C"), others, strict=True)
    more = {name: torch.stack(both) for name, both in pairs if name in want}
    more |= {name: token_score(torch.stack(ys), z, name) for name in SCORES if name in want}
    out = (ys[0] + ys[1]) * (scale * F.silu(z))
    return out if out_proj is None else F.linear(out, out_proj.to(out.dtype)), more


BIMAMBA_SCAN = Table(
    "bimamba_scan",
    Backend(
        "triton",
        partial(fused_bimamba, TRITON),
        TRITON.unsupported,
        TRITON.unavailable,
        default=on_gpu,
    ),
    Backend("numba", partial(fused_bimamba, NUMBA), NUMBA.unsupported, NUMBA.unavailable),
    Backend("reference", _reference),
    follows=SCAN,
)
