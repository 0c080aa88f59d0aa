"""What a bidirectional Mamba mixer does between its projections, in one operation.

    x, z = xz        u = silu(conv(x))        dt, B, C = x_proj(u)
    y = scan(u, softplus(dt_proj(dt) + bias), A, B, C, D)        the same from the other end
    out = out_proj((y + y of the other direction) * silu(z))

Source: Zhu et al., "Vision Mamba", arXiv:2401.09417, algorithm 1; Gu and Dao, "Mamba",
arXiv:2312.00752, figure 3.  Gating the sum instead of each direction is the same by algebra.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.ops import fused_bimamba
from fambav.ops.conv import causal_conv1d
from fambav.ops.dispatch import SCAN, Backend, Table, autocasts, expect_beside, without_autocast
from fambav.ops.selective_scan import selective_scan

ScanInputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Direction(NamedTuple):
    """The parameters of one direction.

    Attributes:
        conv_weight: Kernel of each channel, (dim, width).
        conv_bias: Added to the convolution, (dim,).
        x_proj: Maps a token to dt, B and C, (rank + 2 state, dim).
        dt_proj: Maps dt to the step size of each channel, (dim, rank).
        dt_bias: Added to the step size before softplus, (dim,).
        A: Decay rate, (dim, state), real.
        D: Skip weight, (dim,).
    """

    conv_weight: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor


def bimamba_scan(
    xz: Tensor,
    forward: Direction,
    backward: Direction,
    out_proj: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Convolve, scan in both directions, add, gate and project.

    Nothing is flipped or transposed in memory.  The fused backends keep the input, the projection
    of each token, one sum of both scans and the states before each chunk of steps for the backward
    pass, and make convolution and step sizes again there.  Sums are float32, the state too.

    Args:
        xz: Input x and gate z side by side, (batch, length, 2 dim).
        forward: Parameters of the scan from the first token to the last.
        backward: Parameters of the scan from the last token to the first.
        out_proj: Applied to the result, (out, dim); None for none.
        scale: Factor of the sum; 0.5 takes the mean of both directions.

    Returns:
        (batch, length, out), or (batch, length, dim) without out_proj, in xz's dtype, or that of
        autocast.

    Raises:
        ValueError: If a shape, dtype or device does not fit the others.
        BackendError: If a backend is forced that cannot run these tensors.
    """
    _check(xz, forward, backward, out_proj)
    if autocasts(xz):
        xz = xz.to(torch.get_autocast_dtype(xz.device.type))
    forward, backward = (_cast(direction, xz.dtype) for direction in (forward, backward))
    out_proj = None if out_proj is None else out_proj.to(xz.dtype)
    run = BIMAMBA_SCAN.pick(xz, *forward, *backward)
    with without_autocast(xz):
        y: Tensor = run(xz, forward, backward, out_proj, scale=scale)
    return y


def _cast(direction: Direction, dtype: torch.dtype) -> Direction:
    """Give matrices the dtype of the tokens, and what the scan reads that of its state."""
    wide = torch.promote_types(dtype, torch.float32)
    return direction._replace(
        x_proj=direction.x_proj.to(dtype),
        dt_proj=direction.dt_proj.to(dtype),
        dt_bias=direction.dt_bias.to(wide),
        A=direction.A.to(wide),
        D=direction.D.to(wide),
    )


def _check(xz: Tensor, forward: Direction, backward: Direction, out_proj: Tensor | None) -> None:
    if xz.dim() != 3 or xz.shape[1] < 1 or xz.shape[2] % 2:
        raise ValueError(f"xz has shape {tuple(xz.shape)}, expected (batch, length >= 1, 2 dim)")
    expect_beside("xz", xz, xz.shape, xz)
    dim = xz.shape[2] // 2
    rank, state, width = (
        forward.dt_proj.shape[-1],
        forward.A.shape[-1],
        forward.conv_weight.shape[-1],
    )
    shapes = (
        *((dim, width), (dim,), (rank + 2 * state, dim), (dim, rank)),
        *((dim,), (dim, state), (dim,)),
    )
    for which, direction in (("forward", forward), ("backward", backward)):
        for name, tensor, shape in zip(Direction._fields, direction, shapes, strict=True):
            expect_beside(f"{which}.{name}", tensor, shape, xz)
    if out_proj is not None:
        expect_beside("out_proj", out_proj, (out_proj.shape[0], dim), xz)


def scan_inputs(x: Tensor, direction: Direction, *, reverse: bool) -> ScanInputs:
    """Return u, delta, B and C of one direction for x, all (batch, length, their width)."""
    u = causal_conv1d(x.mT, direction.conv_weight, direction.conv_bias, "silu", reverse=reverse).mT
    rank, state = direction.dt_proj.shape[1], direction.A.shape[1]
    dt, B, C = F.linear(u, direction.x_proj).split((rank, state, state), dim=-1)
    return u, F.linear(dt, direction.dt_proj), B, C


def directed_scan(
    inputs: ScanInputs, A: Tensor, D: Tensor, dt_bias: Tensor | None, *, reverse: bool
) -> Tensor:
    """Scan what `scan_inputs` returned, (batch, length, dim)."""
    u, delta, B, C = inputs
    y: Tensor = selective_scan(
        *(u.mT, delta.mT, A, B.mT, C.mT, D),
        delta_bias=dt_bias,
        delta_softplus=True,
        reverse=reverse,
    )
    return y.mT


def _reference(
    xz: Tensor, forward: Direction, backward: Direction, out_proj: Tensor | None, *, scale: float
) -> Tensor:
    x, z = xz.chunk(2, dim=-1)
    ys = [
        directed_scan(scan_inputs(x, d, reverse=reverse), d.A, d.D, d.dt_bias, reverse=reverse)
        for d, reverse in ((forward, False), (backward, True))
    ]
    y = ys[0] + ys[1]
    out = y * (scale * F.silu(z))
    return out if out_proj is None else F.linear(out, out_proj)


BIMAMBA_SCAN = Table(
    "bimamba_scan",
    fused_bimamba.TRITON_BIMAMBA,
    fused_bimamba.NUMBA_BIMAMBA,
    Backend("reference", _reference),
    follows=SCAN,
)
