"""The bidirectional Mamba mixer between its projections, as one operation.

    x, z = xz        u = silu(conv(x))        dt, B, C = x_proj(u)
    y = scan(u, softplus(dt_proj(dt) + bias), A, B, C, D)        the same from the other end
    out = out_proj((y + y of the other direction) * silu(z))

The Triton and numba backends alternate kernels, each one launch for both directions, and matrix
products.  They keep xz, the projection (B, C, dt), the sum of both scans and the states before each
chunk of tokens for the backward pass, which recomputes u, delta and the gated sum.

Source: Zhu et al., "Vision Mamba", arXiv:2401.09417, algorithm 1; Gu and Dao, "Mamba",
arXiv:2312.00752, figure 3.  Gating the sum instead of each direction is the same by algebra.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from fambav.arguments import is_number, refusal
from fambav.ops.causal_conv1d import causal_conv1d
from fambav.ops.derivatives import refuse
from fambav.ops.dispatch import (
    SCAN,
    Backend,
    Table,
    autocasts,
    expect_beside,
    expect_tensors,
    without_autocast,
)
from fambav.ops.kernels import NUMBA, TRITON, KernelSet, kernel_set, on_gpu
from fambav.ops.selective_scan import selective_scan

ScanInputs = tuple[Tensor, Tensor, Tensor, Tensor]
REVERSE = (False, True)  # of the directions
ROW = 16  # the width of the projection is a multiple of it, so that B and C are aligned


class Direction(NamedTuple):
    """The parameters of one direction.

    Attributes:
        conv_weight: Kernels of the convolution, (dim, width).
        conv_bias: Added to the convolution, (dim,).
        x_proj: Maps a token to dt, B and C, (rank + 2 state, dim).
        dt_proj: Maps dt to delta, (dim, rank).
        dt_bias: Added to delta before softplus, (dim,).
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

    Nothing is flipped or transposed in memory.  The state is float32, or float64 if xz is.

    Args:
        xz: Input x and gate z, concatenated, (batch, length, 2 dim), of any floating-point dtype;
            the batch may be empty.
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

    Source: Zhu et al., "Vision Mamba", arXiv:2401.09417, algorithm 1.
    """
    _check(xz, forward, backward, out_proj)
    if not is_number(scale):
        raise refusal("scale", scale, "a number")
    if autocasts(xz):
        xz = xz.to(torch.get_autocast_dtype(xz.device.type))
    forward, backward = (_cast(direction, xz.dtype) for direction in (forward, backward))
    out_proj = None if out_proj is None else out_proj.to(xz.dtype)
    run = BIMAMBA_SCAN.pick(xz, *forward, *backward)
    with without_autocast(xz):
        y: Tensor = run(xz, forward, backward, out_proj, scale=scale)
    return y


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


def directed_scan(
    inputs: ScanInputs, A: Tensor, D: Tensor, dt_bias: Tensor | None, *, reverse: bool
) -> Tensor:
    """Scan the results of `scan_inputs`; return y, (batch, length, dim)."""
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


_INPUTS = (
    ", ".join(
        ("Tensor xz", *(f"Tensor {name}{end}" for end in ("", "_b") for name in Direction._fields))
    )
    + ", Tensor? out_proj"
)
_OPTIONS = "*, float scale, str kernels"


def _fused(
    kernels: KernelSet,
    xz: Tensor,
    forward: tuple[Tensor, ...],
    backward: tuple[Tensor, ...],
    out_proj: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    tensors = (xz, *forward, *backward, out_proj)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out: Tensor = _forward(*tensors, scale=scale, kernels=kernels.name, keep=keep)[0]
    return out


class _Mixer(NamedTuple):
    """The parameters of both directions, as kernels and matrix products take them.

    Attributes:
        run: The kernels.
        state, rank: Widths of B and C, and of dt.
        conv: Weights and biases of the convolutions.
        x_proj: (2, row, dim), whose rows are B, C, dt and zero padding to a multiple of `ROW`.
        dt_proj: (2, rank, dim).
        A: (dim, state) of each direction.
        channels: D and the bias of delta, (dim,) of each direction.
    """

    run: Any
    state: int
    rank: int
    conv: tuple[list[Tensor], list[Tensor]]
    x_proj: Tensor
    dt_proj: Tensor
    A: list[Tensor]
    channels: tuple[list[Tensor], list[Tensor]]

    @classmethod
    def of(cls, parameters: tuple[Tensor, ...], kernels: str) -> _Mixer:
        ends = zip(parameters[:7], parameters[7:], strict=True)
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D = (list(pair) for pair in ends)
        (dim, rank), state = dt_proj[0].shape, A[0].shape[1]
        rows = x_proj[0].new_zeros(2, _row(rank, state), dim)
        for row, weight in zip(rows, x_proj, strict=True):
            torch.cat((weight[rank:], weight[:rank]), out=row[: len(weight)])
        return cls(
            run=kernel_set(kernels).load(),
            state=state,
            rank=rank,
            conv=(conv_weight, conv_bias),
            x_proj=rows,
            dt_proj=torch.stack(dt_proj).mT,
            A=[x.contiguous() for x in A],
            channels=([x.contiguous() for x in D], [x.contiguous() for x in dt_bias]),
        )

    def parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """View B and C, (2, batch, length, 1, state), and dt, (2, batch length, rank)."""
        n, dt = self.state, slice(2 * self.state, 2 * self.state + self.rank)
        rows = projected.unsqueeze(3)
        return rows[..., :n], rows[..., n : 2 * n], projected.flatten(1, 2)[..., dt]

    def convolved(self, x: Tensor) -> Tensor:
        """Return u, (2, batch, length, dim)."""
        u = x.new_empty(2, *x.shape)
        self.run.conv_forward(x, *self.conv, u, silu=True, reverse=REVERSE)
        return u

    def delta(self, dt: Tensor, like: Tensor) -> Tensor:
        """Return delta before bias and softplus, shaped like u."""
        return torch.bmm(dt, self.dt_proj).view_as(like)


def _row(rank: int, state: int) -> int:
    """Return the padded width of the projection."""
    return -(-(rank + 2 * state) // ROW) * ROW


@custom_op(
    "fambav::bimamba_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    xz: Tensor, *rest: Any, scale: float, kernels: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result; with `keep` also the projection, the sum of both scans and the states."""
    *parameters, out_proj = rest
    mixer = _Mixer.of(tuple(parameters), kernels)
    x, z = xz.chunk(2, dim=-1)  # (batch, length, dim)
    u = mixer.convolved(x)  # (2, batch, length, dim)
    projected = torch.bmm(u.flatten(1, 2), mixer.x_proj.mT).unflatten(1, x.shape[:2])
    B, C, dt = mixer.parts(projected)  # of (2, batch, length, row)
    y = torch.empty_like(u)
    inputs = u, mixer.delta(dt, u), mixer.A, B, C, *mixer.channels
    _, kept = mixer.run.scan_forward(*inputs, y, softplus=True, reverse=REVERSE, keep=keep)
    out = x.new_empty(x.shape)
    total = x.new_empty(x.shape if keep else 0)
    mixer.run.gate_forward(y, z, out, total if keep else None, scale=scale)
    if out_proj is not None:
        out = torch.matmul(out, out_proj.mT)
    return out, projected if keep else x.new_empty(0), total, kept


@_forward.register_fake
def _forward_shapes(xz: Tensor, *rest: Any, **options: Any) -> Any:
    (batch, length, width), rank, state = xz.shape, rest[3].shape[1], rest[5].shape[1]
    dim, out_proj, keep = width // 2, rest[-1], options["keep"]
    out = xz.new_empty(batch, length, dim if out_proj is None else out_proj.shape[0])
    if not keep:
        return out, xz.new_empty(0), xz.new_empty(0), xz.new_empty(0, dtype=torch.float32)
    projected = xz.new_empty(2, batch, length, _row(rank, state))
    shape = kernel_set(options["kernels"]).kept_shape(2, batch, length, dim, state)
    total, kept = xz.new_empty(batch, length, dim), xz.new_empty(shape, dtype=torch.float32)
    return out, projected, total, kept


@custom_op(
    "fambav::bimamba_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor projected, Tensor total, Tensor kept, {_INPUTS}, {_OPTIONS})"
    " -> Tensor[]",
)
def _backward(
    grad: Tensor,
    projected: Tensor,
    total: Tensor,
    kept: Tensor,
    xz: Tensor,
    *rest: Any,
    scale: float,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of xz, of each parameter of both directions, and of out_proj if given.

    Both directions are in one tensor, (2, *shape), since an operator must not return slices of one.
    """
    *parameters, out_proj = rest
    mixer = _Mixer.of(tuple(parameters), kernels)
    dxz = torch.empty_like(xz)
    (x, z), (dx, dz) = xz.chunk(2, dim=-1), dxz.chunk(2, dim=-1)
    dy, dout_proj = torch.empty_like(total), []
    if out_proj is None:
        mixer.run.gate_backward(grad, total, z, dy, dz, scale=scale)
    else:
        gated = torch.empty_like(total)
        mixer.run.gate_backward(grad @ out_proj, total, z, dy, dz, gated, scale=scale)
        dout_proj = [grad.flatten(0, 1).mT @ gated.flatten(0, 1)]

    u = mixer.convolved(x)
    B, C, dt = mixer.parts(projected)
    du, ddelta, dprojected = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(projected)
    dB, dC, ddt = mixer.parts(dprojected)
    inputs = u, mixer.delta(dt, u), mixer.A, B, C, *mixer.channels
    outputs = du, ddelta, dB, dC
    dA, dD, dt_bias = mixer.run.scan_backward(
        dy.expand_as(u), None, kept, *inputs, *outputs, softplus=True, reverse=REVERSE
    )
    ddelta = ddelta.flatten(1, 2)  # (2, batch length, dim)
    ddt.copy_(torch.bmm(ddelta, mixer.dt_proj.mT))
    dt_proj = torch.bmm(ddelta.mT, dt)
    rows = dprojected.flatten(1, 2)
    BC, x_proj, _ = torch.bmm(rows.mT, u.flatten(1, 2)).split(
        (2 * mixer.state, mixer.rank, rows.shape[2] - 2 * mixer.state - mixer.rank), dim=1
    )
    x_proj = torch.cat((x_proj, BC), dim=1)
    du.flatten(1, 2).baddbmm_(rows, mixer.x_proj)
    conv = mixer.run.conv_backward(du, x, *mixer.conv, dx, silu=True, reverse=REVERSE)
    both = (*conv, x_proj, dt_proj, dt_bias, dA, dD)
    return [dxz, *(g.contiguous() for g in both), *dout_proj]


@_backward.register_fake
def _backward_shapes(grad: Any, projected: Any, total: Any, kept: Any, *rest: Any, **_: Any) -> Any:
    del grad, projected, total, kept
    xz, *parameters, out_proj = rest
    grads = [torch.empty_like(xz)]
    for name, parameter in zip(Direction._fields, parameters, strict=False):
        dtype = xz.dtype if name in ("x_proj", "dt_proj") else torch.float32
        grads.append(xz.new_empty(2, *parameter.shape, dtype=dtype))
    return grads if out_proj is None else [*grads, torch.empty_like(out_proj)]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs)
    ctx.options = {name: keyword_only_inputs[name] for name in ("scale", "kernels")}


def _gradient(ctx: Any, grad: Any, *_: Any) -> Any:
    projected, total, kept, *inputs = ctx.saved_tensors  # read once, as checkpointing requires
    dxz, *grads = _backward(grad, projected, total, kept, *inputs, **ctx.options)
    both, out_proj = grads[: len(Direction._fields)], grads[len(Direction._fields) :]
    each = zip((g[end] for end in (0, 1) for g in both), inputs[1:-1], strict=True)
    return dxz, *(g.to(p.dtype) for g, p in each), out_proj[0] if out_proj else None


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(refuse("bimamba_scan"))


BIMAMBA_SCAN = Table(
    "bimamba_scan",
    Backend(
        "triton", partial(_fused, TRITON), TRITON.unsupported, TRITON.unavailable, default=on_gpu
    ),
    Backend("numba", partial(_fused, NUMBA), NUMBA.unsupported, NUMBA.unavailable),
    Backend("reference", _reference),
    follows=SCAN,
)
