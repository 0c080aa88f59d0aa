"""The operator of the bidirectional Mamba mixer, made of kernels and matrix products.

The Triton and numba backends alternate kernels, each one launch for both directions, and matrix
products.  They keep xz, the projection (B, C, dt), the sum of both scans and the states before each
chunk of tokens for the backward pass, which recomputes u, delta and the gated sum.

What reductions read of a mixer is a by-product: a score of each token is summed in the kernel of
the gate, B and C are kept anyway, and delta is written where it is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from fambav.ops import mixer_parameters
from fambav.ops.derivatives import refuse
from fambav.ops.kept_states import kept_dtype
from fambav.ops.kernels import NUMBA, KernelSet, kernel_set
from fambav.ops.mixer_parameters import Parts, row_width
from fambav.ops.products import choose
from fambav.ops.scratch import scratch

REVERSE = (False, True)  # of the directions
# Products that sum over all tokens are split over the batch, as few of their large results would
# not fill a GPU: 16 slices of 128 images with 384 channels and a row of 48 are 96 of its programs.
SLICES = {"triton": 16, "numba": 1}
# Scores of a token: what is summed over its channels, y silu(z) or y, and whether above 0 alone.
SCORES = {
    "gated": dict(gated=True, clipped=True),
    "gated_unclipped": dict(gated=True, clipped=False),
    "ungated": dict(gated=False, clipped=True),
    "ungated_unclipped": dict(gated=False, clipped=False),
}


Multiply = Callable[[Tensor, Tensor], Tensor]  # as `choose` returns it


class Direction(NamedTuple):
    """The parameters of one direction.

    Attributes:
        conv_weight: Kernels of the convolution, (dim, width).
        conv_bias: Added to the convolution, (dim,).
        x_proj: Maps a token to dt, B and C, (rank + 2 state, dim).
        dt_proj: Maps dt to delta, (dim, rank).
        dt_bias: Added to delta before softplus, (dim,).
        A: Decay rate, (dim, state), real; with `log_A` the logarithm of its negative.
        D: Skip weight, (dim,).
    """

    conv_weight: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor


_INPUTS = (
    ", ".join(
        ("Tensor xz", *(f"Tensor {name}{end}" for end in ("", "_b") for name in Direction._fields))
    )
    + ", Tensor? out_proj, Tensor? skipped, Tensor? skipped_dt"
)
_OPTIONS = "*, float scale, str gap_policy, bool log_A, str kernels"


def fused_bimamba(
    kernels: KernelSet,
    xz: Tensor,
    forward: tuple[Tensor, ...],
    backward: tuple[Tensor, ...],
    *rest: Tensor | None,
    scale: float,
    gap_policy: str,
    log_A: bool,
    want: Collection[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run `bimamba_scan` with one set of kernels.

    Args:
        kernels: The set.
        xz: As in `bimamba_scan`.
        forward: Likewise.
        backward: Likewise.
        rest: out_proj, skipped and skipped_dt, likewise.
        scale: Likewise.
        gap_policy: How the state ages; "none" without a gap.
        log_A: As in `bimamba_scan`.
        want: As in `bimamba_scan`.

    Returns:
        The result, and by name all that is wanted and maybe more.
    """
    tensors = (xz, *forward, *backward, *rest)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    score = next((name for name in SCORES if name in want), None)
    options = dict(scale=scale, gap_policy=gap_policy, log_A=log_A, kernels=kernels.name, keep=keep)
    out, projected, _, _, scores, delta = _forward(
        *tensors, **options, score=score, return_dt="delta" in want
    )
    n = forward[5].shape[1]  # of the state
    B, C = projected.detach()[..., : 2 * n].split(n, dim=-1)
    return out, {"delta": delta, "B": B, "C": C, str(score): scores.detach()}


class _Mixer(NamedTuple):
    """The parameters of both directions, as kernels and matrix products take them.

    Attributes:
        run: The kernels.
        state, rank: Widths of B and C, and of dt.
        conv: Weights and biases of the convolutions.
        x_proj: (2, row, dim), whose rows are B, C, dt and zero padding to a multiple of 16.
        dt_proj: (2, dim, row - 2 state), zeros behind the rank.
        A: (2, dim, state).
        channels: D and the bias of delta, (dim,) of each direction.
        out_proj: (out, dim), in the dtype of the tokens, or None.
    """

    run: Any
    state: int
    rank: int
    conv: tuple[list[Tensor], list[Tensor]]
    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    channels: tuple[list[Tensor], list[Tensor]]
    out_proj: Tensor | None

    @classmethod
    def of(
        cls,
        parameters: tuple[Tensor, ...],
        out_proj: Tensor | None,
        dtype: torch.dtype,
        *,
        log_A: bool,
        kernels: str,
    ) -> _Mixer:
        ends = zip(parameters[:7], parameters[7:], strict=True)
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D = (list(pair) for pair in ends)
        run = kernel_set(kernels).load()
        pack = getattr(run, "pack_parameters", mixer_parameters.pack_parameters)
        packed = pack(x_proj, dt_proj, A, out_proj, dtype=dtype, log_A=log_A)
        return cls(
            run=run,
            state=A[0].shape[1],
            rank=dt_proj[0].shape[1],
            conv=(conv_weight, conv_bias),
            **packed._asdict(),
            channels=([x.contiguous() for x in D], [x.contiguous() for x in dt_bias]),
        )

    def parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """View B and C, (2, batch, length, 1, state), and dt, (2, batch length, row - 2 state)."""
        n, rows = self.state, projected.unsqueeze(3)
        return rows[..., :n], rows[..., n : 2 * n], projected.flatten(1, 2)[..., 2 * n :]

    def convolved(self, x: Tensor) -> Tensor:
        """Return u, (2, batch, length, dim)."""
        u = scratch("u", (2, *x.shape), x)
        self.run.conv_forward(x, *self.conv, u, silu=True, reverse=REVERSE)
        return u

    def delta(self, dt: Tensor, like: Tensor) -> Tensor:
        """Return delta before bias and softplus, shaped like u."""
        delta = scratch("delta", like.shape, like)
        torch.bmm(dt, self.dt_proj.mT, out=delta.flatten(1, 2))
        return delta


def _products(
    multiply: Multiply, a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """Multiply the matrices of each direction, where oneDNN does on their own.

    Args:
        multiply: As `choose` returned it.
        a: (2, rows, terms).
        b: (2, columns, terms).
        out: Output for the result, or None for a new tensor.
        add: Whether to add to it.

    Returns:
        a @ b.mT, (2, rows, columns).
    """
    if multiply is F.linear:
        return out.baddbmm_(a, b.mT) if out is not None and add else torch.bmm(a, b.mT, out=out)
    out = a.new_empty(2, a.shape[1], b.shape[1]) if out is None else out
    for end in (0, 1):
        product = multiply(a[end], b[end])
        out[end].add_(product) if add else out[end].copy_(product)
    return out


def _over_tokens(multiply: Multiply, a: Tensor, b: Tensor, slices: int) -> Tensor:
    """Multiply transposed tokens by tokens; (2, slices, of a, of b), to be summed over slices."""
    a, b = (x.reshape(2 * slices, -1, x.shape[-1]) for x in (a, b))
    if multiply is F.linear:
        return torch.bmm(a.mT, b).view(2, slices, a.shape[2], b.shape[2])
    if a.shape[2] > b.shape[2]:  # oneDNN takes far longer for few columns than for few rows
        return _products(multiply, b.mT, a.mT).mT[:, None]
    return _products(multiply, a.mT, b.mT)[:, None]


@custom_op(
    "fambav::bimamba_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, bool keep, str? score, bool return_dt)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    xz: Tensor,
    *rest: Any,
    scale: float,
    gap_policy: str,
    log_A: bool,
    kernels: str,
    keep: bool,
    score: str | None,
    return_dt: bool,
) -> tuple[Tensor, ...]:
    """Compute the mixer.

    Returns:
        The result and the projection; with `keep` the sum of both scans and the states; the score,
        (2, batch, length), and the step size, (2, batch, length, dim), where they are wanted.  What
        is not is empty.
    """
    *parameters, out_proj, skipped, skipped_dt = rest
    mixer = _Mixer.of(tuple(parameters), out_proj, xz.dtype, log_A=log_A, kernels=kernels)
    x, z = xz.chunk(2, dim=-1)  # (batch, length, dim)
    u = mixer.convolved(x)  # (2, batch, length, dim)
    multiply = choose(x, mixer.x_proj[0])
    projected = _products(multiply, u.flatten(1, 2), mixer.x_proj).unflatten(1, x.shape[:2])
    B, C, dt = mixer.parts(projected)  # of (2, batch, length, row)
    raw = mixer.delta(dt, u)
    # Numba's kernels read an element before they write it: delta becomes y, and that becomes out.
    in_place = kernels == NUMBA.name
    y = raw if in_place else torch.empty_like(u)
    inputs = u, raw, mixer.A, B, C, *mixer.channels
    delta = torch.empty_like(u, dtype=torch.float32) if return_dt else None
    _, kept = mixer.run.scan_forward(
        *inputs, y, softplus=True, reverse=REVERSE, keep=keep,
        skipped=skipped, skipped_dt=skipped_dt, gap_policy=gap_policy, dt=delta,
        **{"states_dtype": kept_dtype(xz.dtype)} if kernels == "triton" else {},
    )  # fmt: skip
    out = y[0] if in_place and out_proj is not None else x.new_empty(x.shape)
    total = x.new_empty(x.shape if keep else 0)
    single = partial(xz.new_empty, dtype=torch.float32)
    scores = single(u.shape[:3] if score else 0)
    mixer.run.gate_forward(
        *(y, z, out, total if keep else None),
        scale=scale,
        **dict(SCORES[score], score=scores) if score else {},
    )
    if mixer.out_proj is not None:
        out = choose(out, mixer.out_proj)(out, mixer.out_proj)
    return out, projected, total, kept, scores, single(0) if delta is None else delta


@_forward.register_fake
def _forward_shapes(xz: Tensor, *rest: Any, **options: Any) -> Any:
    (batch, length, width), rank, state = xz.shape, rest[3].shape[1], rest[5].shape[1]
    dim, out_proj, keep = width // 2, rest[14], options["keep"]
    single = partial(xz.new_empty, dtype=torch.float32)
    shape = kernel_set(options["kernels"]).kept_shape(2, batch, length, dim, state)
    states = kept_dtype(xz.dtype) if options["kernels"] == "triton" else torch.float32
    return (
        xz.new_empty(batch, length, dim if out_proj is None else out_proj.shape[0]),
        xz.new_empty(2, batch, length, row_width(rank, state)),
        xz.new_empty((batch, length, dim) if keep else 0),
        xz.new_empty(shape if keep else 0, dtype=states),
        single((2, batch, length) if options["score"] else 0),
        single((2, batch, length, dim) if options["return_dt"] else 0),
    )


@custom_op(
    "fambav::bimamba_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor projected, Tensor total, Tensor kept, {_INPUTS}, Tensor? dsteps,"
    f" {_OPTIONS}) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    projected: Tensor,
    total: Tensor,
    kept: Tensor,
    xz: Tensor,
    *rest: Any,
    scale: float,
    gap_policy: str,
    log_A: bool,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of xz, each parameter of both directions; out_proj, skipped_dt if given.

    Both directions are in one tensor, (2, *shape), since an operator must not return slices of one.
    """
    *parameters, out_proj, skipped, skipped_dt, dsteps = rest
    mixer = _Mixer.of(tuple(parameters), out_proj, xz.dtype, log_A=log_A, kernels=kernels)
    dxz = torch.empty_like(xz)
    (x, z), (dx, dz) = xz.chunk(2, dim=-1), dxz.chunk(2, dim=-1)
    dy, dout_proj = scratch("dy", total.shape, total), []
    if out_proj is None or mixer.out_proj is None:
        mixer.run.gate_backward(grad, total, z, dy, dz, scale=scale)
    else:
        gated, project = scratch("gated", total.shape, total), choose(total, mixer.out_proj)
        inner = project(grad, mixer.out_proj.mT)
        mixer.run.gate_backward(inner, total, z, dy, dz, gated, scale=scale)
        product = project(grad.flatten(0, 1).mT, gated.flatten(0, 1).mT)
        dout_proj = [product.to(out_proj.dtype, memory_format=torch.contiguous_format)]

    u, multiply = mixer.convolved(x), choose(x, mixer.x_proj[0])
    B, C, dt = mixer.parts(projected)
    delta, du = mixer.delta(dt, u), scratch("du", u.shape, u)
    ddelta = delta if kernels == NUMBA.name else torch.empty_like(u)  # in place, as before
    dprojected = torch.empty_like(projected)
    dB, dC, ddt = mixer.parts(dprojected)
    inputs = u, delta, mixer.A, B, C, *mixer.channels
    dskipped_dt = [] if skipped_dt is None else [skipped_dt.new_empty(u.shape)]
    sums: dict[str, Any] = {"partial": True} if kernels == "triton" else {}
    dA, dD, dt_bias = mixer.run.scan_backward(
        dy.expand_as(u), None, kept, *inputs, du, ddelta, dB, dC, softplus=True, reverse=REVERSE,
        skipped=skipped, skipped_dt=skipped_dt, gap_policy=gap_policy,
        ddt=dsteps, dskipped_dt=next(iter(dskipped_dt), None), **sums,
    )  # fmt: skip
    ddelta, rows = ddelta.flatten(1, 2), dprojected.flatten(1, 2)  # (2, batch length, ...)
    _products(multiply, ddelta, mixer.dt_proj.mT, out=ddt)  # zeros behind the rank
    slices = gcd(len(xz), SLICES[kernels])
    dt_proj = _over_tokens(multiply, ddelta, dt, slices)
    x_proj = _over_tokens(multiply, rows, u.flatten(1, 2), slices)
    _products(multiply, rows, mixer.x_proj.mT, out=du.flatten(1, 2), add=True)
    conv = mixer.run.conv_backward(du, x, *mixer.conv, dx, silu=True, reverse=REVERSE, **sums)
    conv, scans = ((t if sums else t.unsqueeze(1) for t in ts) for ts in (conv, (dt_bias, dA, dD)))
    finish = getattr(mixer.run, "finish_gradients", mixer_parameters.finish_gradients)
    both = finish(
        Parts._make((*conv, x_proj, dt_proj, *scans)),
        mixer.A if log_A else None,
        rank=mixer.rank,
        dtypes=_dtypes(parameters),
    )
    return [dxz, *both, *dout_proj, *dskipped_dt]


def _dtypes(parameters: Sequence[Tensor]) -> list[torch.dtype]:
    """Return those of the gradients of each parameter of both directions."""
    pairs = zip(parameters[:7], parameters[7:14], strict=True)
    return [torch.promote_types(a.dtype, b.dtype) for a, b in pairs]


@_backward.register_fake
def _backward_shapes(grad: Any, projected: Any, total: Any, kept: Any, *rest: Any, **_: Any) -> Any:
    del grad, projected, total, kept
    xz, *parameters, out_proj, _, skipped_dt, _ = rest
    pairs = zip(parameters[:7], _dtypes(parameters), strict=True)
    grads = [torch.empty_like(xz), *(xz.new_empty(2, *p.shape, dtype=dtype) for p, dtype in pairs)]
    grads += [] if out_proj is None else [out_proj.new_empty(out_proj.shape)]
    return grads if skipped_dt is None else [*grads, skipped_dt.new_empty(skipped_dt.shape)]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:4], *inputs)
    ctx.options = {
        name: keyword_only_inputs[name] for name in ("scale", "gap_policy", "log_A", "kernels")
    }
    ctx.shape = output[0].shape


def _gradient(ctx: Any, grad: Any, *others: Any) -> Any:
    projected, total, kept, *inputs = ctx.saved_tensors  # read once, as checkpointing requires
    grad = total.new_zeros(ctx.shape) if grad is None else grad
    dxz, *grads = _backward(grad, projected, total, kept, *inputs, others[-1], **ctx.options)
    both, given = grads[: len(Direction._fields)], iter(grads[len(Direction._fields) :])
    each = zip((g[end] for end in (0, 1) for g in both), inputs[1:15], strict=True)
    out_proj, skipped_dt = (None if x is None else next(given) for x in (inputs[15], inputs[17]))
    return dxz, *(g.to(p.dtype) for g, p in each), out_proj, None, skipped_dt


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(refuse("bimamba_scan"))
