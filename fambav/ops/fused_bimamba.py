"""The bidirectional Mamba operation by a set of compiled kernels, as one operator with a gradient.

    xz -> conv, both directions -> u -> x_proj -> B, C, dt -> dt_proj -> delta -> both scans -> gate

Kernels and matrix products alternate; both directions are one launch each.  For the backward pass
xz, the projection (B, C, dt), the sum of both scans and the states before each chunk of steps are
kept; u, delta and the gated sum are made again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from fambav.ops.dispatch import Backend
from fambav.ops.kernels import NUMBA, TRITON, KernelSet, kernel_set, on_gpu

REVERSE = (False, True)
ROW = 16  # numbers of which a row of the projection is a multiple, so that B and C are aligned

_NAMES = ("conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D")
_INPUTS = (
    ", ".join(("Tensor xz", *(f"Tensor {name}{end}" for end in ("", "_b") for name in _NAMES)))
    + ", Tensor? out_proj"
)
_OPTIONS = "*, float scale, str kernels"


def refuses(kernels: KernelSet, xz: Tensor, *parameters: Tensor) -> str | None:
    """Say why these tensors cannot run here, or None."""
    return kernels.refuses(xz, *parameters) if len(xz) else "the batch is empty"


def scan(
    kernels: KernelSet,
    xz: Tensor,
    forward: tuple[Tensor, ...],
    backward: tuple[Tensor, ...],
    out_proj: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    """Do what `bimamba_scan` says."""
    tensors = (xz, *forward, *backward, out_proj)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out: Tensor = _forward(*tensors, scale=scale, kernels=kernels.name, keep=keep)[0]
    return out


TRITON_BIMAMBA = Backend(
    "triton", partial(scan, TRITON), partial(refuses, TRITON), TRITON.missing, default=on_gpu
)
NUMBA_BIMAMBA = Backend("numba", partial(scan, NUMBA), partial(refuses, NUMBA), NUMBA.missing)


class _Mixer(NamedTuple):
    """The parameters of both directions, as kernels and matrix products take them.

    Attributes:
        run: The kernels.
        state, rank: Numbers of B, of C and of dt for a token.
        conv: Weights and biases of the convolutions.
        x_proj: (2, row, dim), whose rows are B, C, dt and zeros up to a multiple of `ROW`.
        dt_proj: (2, rank, dim).
        rates: A.
        channels: D and the bias of delta.
    """

    run: Any
    state: int
    rank: int
    conv: tuple[list[Tensor], list[Tensor]]
    x_proj: Tensor
    dt_proj: Tensor
    rates: list[Tensor]
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
            rates=[rate.contiguous() for rate in A],
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

    def steps(self, dt: Tensor, like: Tensor) -> Tensor:
        """Return delta before bias and softplus, shaped like u."""
        return torch.bmm(dt, self.dt_proj).view_as(like)


def _row(rank: int, state: int) -> int:
    """Return the numbers in a row of the projection."""
    return -(-(rank + 2 * state) // ROW) * ROW


@custom_op(
    "fambav::bimamba_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    xz: Tensor, *rest: Any, scale: float, kernels: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result; and if they are kept the projection, the sum of the scans, and states."""
    *parameters, out_proj = rest
    mixer = _Mixer.of(tuple(parameters), kernels)
    x, z = xz.chunk(2, dim=-1)
    u = mixer.convolved(x)
    projected = torch.bmm(u.flatten(1, 2), mixer.x_proj.mT).unflatten(1, x.shape[:2])
    B, C, dt = mixer.parts(projected)
    y = torch.empty_like(u)
    given = u, mixer.steps(dt, u), mixer.rates, B, C, *mixer.channels
    _, kept = mixer.run.scan_forward(*given, y, softplus=True, reverse=REVERSE, keep=keep)
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
    out = xz.new_empty(batch, length, dim if out_proj is None else len(out_proj))
    if not keep:
        none = xz.new_empty(0)
        return out, none, torch.empty_like(none), none.new_empty(0, dtype=torch.float32)
    projected = xz.new_empty(2, batch, length, _row(rank, state))
    shape = kernel_set(options["kernels"]).load().kept_shape(2, batch, length, dim, state)
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

    Directions stay together, (2, *shape): slices of one tensor, which an operator may not return.
    """
    *parameters, out_proj = rest
    mixer = _Mixer.of(tuple(parameters), kernels)
    dxz = torch.empty_like(xz)
    (x, z), (dx, dz) = xz.chunk(2, dim=-1), dxz.chunk(2, dim=-1)
    dy, found = torch.empty_like(total), []
    if out_proj is None:
        mixer.run.gate_backward(grad, total, z, dy, dz, scale=scale)
    else:
        gated = torch.empty_like(total)
        mixer.run.gate_backward(grad @ out_proj, total, z, dy, dz, gated, scale=scale)
        found = [grad.flatten(0, 1).mT @ gated.flatten(0, 1)]

    u = mixer.convolved(x)
    B, C, dt = mixer.parts(projected)
    du, ddelta, dprojected = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(projected)
    dB, dC, ddt = mixer.parts(dprojected)
    given = u, mixer.steps(dt, u), mixer.rates, B, C, *mixer.channels
    places = du, ddelta, dB, dC
    sums = mixer.run.scan_backward(
        dy.expand_as(u), None, kept, *given, *places, softplus=True, reverse=REVERSE
    )
    dA, dD, dt_bias = sums
    by_token = ddelta.flatten(1, 2)
    ddt.copy_(torch.bmm(by_token, mixer.dt_proj.mT))
    dt_proj = torch.bmm(by_token.mT, dt)
    rows = dprojected.flatten(1, 2)
    BC, x_proj, _ = torch.bmm(rows.mT, u.flatten(1, 2)).split(
        (2 * mixer.state, mixer.rank, rows.shape[2] - 2 * mixer.state - mixer.rank), dim=1
    )
    x_proj = torch.cat((x_proj, BC), dim=1)
    du.flatten(1, 2).baddbmm_(rows, mixer.x_proj)
    conv = mixer.run.conv_backward(du, x, *mixer.conv, dx, silu=True, reverse=REVERSE)
    both = (*conv, x_proj, dt_proj, dt_bias, dA, dD)
    return [dxz, *(g.contiguous() for g in both), *found]


@_backward.register_fake
def _backward_shapes(grad: Any, projected: Any, total: Any, kept: Any, *rest: Any, **_: Any) -> Any:
    del grad, projected, total, kept
    xz, *parameters, out_proj = rest
    found = [torch.empty_like(xz)]
    for name, parameter in zip(_NAMES, parameters, strict=False):
        product = name in ("x_proj", "dt_proj")
        dtype = xz.dtype if product else torch.float32
        found.append(xz.new_empty(2, *parameter.shape, dtype=dtype))
    return found if out_proj is None else [*found, torch.empty_like(out_proj)]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs)
    ctx.options = {name: keyword_only_inputs[name] for name in ("scale", "kernels")}


def _gradient(ctx: Any, grad: Any, *_: Any) -> Any:
    projected, total, kept, *inputs = ctx.saved_tensors  # read once, which checkpointing asks for
    dxz, *found = _backward(grad, projected, total, kept, *inputs, **ctx.options)
    both, out_proj = found[: len(_NAMES)], found[len(_NAMES) :]
    each = zip((g[end] for end in (0, 1) for g in both), inputs[1:-1], strict=True)
    return dxz, *(g.to(p.dtype) for g, p in each), out_proj[0] if out_proj else None


_forward.register_autograd(_gradient, setup_context=_setup)
