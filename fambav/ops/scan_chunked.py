"""Selective scan in chunks of batched PyTorch calls, for CPUs without a compiler.

    decay, drive          of a whole chunk at once, (steps, rows, groups, state, width)
    h = decay h + drive   one call per step
    y = C h               of a whole chunk at once, a batched vector-matrix product

Rows are samples of the batch, and width is the channels of a group.  Channels are the last axis, so
that every call runs over contiguous memory, and a chunk is short enough for its buffers to stay in
the cache.  The reverse direction takes chunks and steps from the end.

Only the inputs and the state before each chunk are kept for the backward pass, which recomputes
each chunk.  Forward and backward are opaque operators to `torch.compile`, which would unroll their
loops.  It is the fallback on a GPU without Triton: slow, but small in memory.

Source: the recurrence of Gu and Dao, "Mamba", arXiv:2312.00752, algorithm 2, and the recomputation
of its section 3.3.2; chunks of batched calls in place of one fused kernel are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from fambav.ops.derivatives import refuse
from fambav.ops.dispatch import SCAN

LOG2_E = 1.4426950408889634  # exp2 is three times faster than exp
STEP_NUMBERS = 1 << 16  # elements of a step of a block: fits the cache, amortizes a call
CHUNK_NUMBERS = 5 << 17  # elements of a chunk of a block, of which there are three buffers
MAX_STEPS = 32  # of a chunk
GPU_STEPS = 16  # in one chunk of the whole batch: launches cost more than memory traffic

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, "
    "*, bool softplus, bool reverse"
)


def block_size(batch: int, dim: int, state: int, device: torch.device) -> tuple[int, int]:
    """Return the rows of a block and the steps of a chunk."""
    if device.type != "cpu":
        return max(1, batch), GPU_STEPS
    most = max(1, STEP_NUMBERS // (dim * state))
    rows = -(-batch // -(-batch // most)) if batch else 1
    # Of a symbolic batch, `max` and `min` would add guards that torch.export refuses.
    return rows, torch.sym_max(1, torch.sym_min(MAX_STEPS, CHUNK_NUMBERS // (rows * dim * state)))


def by_step(x: Tensor, groups: int) -> Tensor:
    """View (batch, dim, length) as (length, batch, groups, width)."""
    steps: Tensor = x.unflatten(1, (groups, -1)).permute(3, 0, 1, 2)
    return steps


class Views(NamedTuple):
    """The inputs of a scan, or their gradients, with time first.

    Attributes:
        u, delta, z: (length, batch, groups, width).
        A: (groups, state, width).
        B, C: (length, batch, groups, state).
        D, bias: (groups, width).
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(
        cls,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
    ) -> Views:
        """View the inputs of `scan`; A, D and bias are upcast to the dtype of the state."""
        dtype, groups = torch.promote_types(u.dtype, torch.float32), B.shape[1]
        return cls(
            u=by_step(u, groups),
            delta=by_step(delta, groups),
            A=A.to(dtype).unflatten(0, (groups, -1)).mT.contiguous(),
            B=B.permute(3, 0, 1, 2),
            C=C.permute(3, 0, 1, 2),
            D=None if D is None else D.to(dtype).unflatten(0, (groups, -1)),
            z=None if z is None else by_step(z, groups),
            bias=None if bias is None else bias.to(dtype).unflatten(0, (groups, -1)),
        )

    def rows(self, rows: slice) -> Views:
        """Take some rows of the batch."""
        u, delta, B, C = (x[:, rows] for x in (self.u, self.delta, self.B, self.C))
        z = None if self.z is None else self.z[:, rows]
        return self._replace(u=u, delta=delta, B=B, C=C, z=z)


class _Block(NamedTuple):
    """The inputs of some rows, contiguous and in the dtype of the state.

    Attributes:
        delta: After softplus, (length, rows, groups, width).
        drive: delta u, shaped like delta.
        B, C: (length, rows, groups, state).
    """

    delta: Tensor
    drive: Tensor
    B: Tensor
    C: Tensor


class _Grads(NamedTuple):
    """Results of the backward steps.

    Attributes:
        y: Recomputed, before skip and gate; empty without a gate.
        ddrive: (length, rows, groups, width).
        ddelta: Of that, the part through the decay alone.
        dB, dC: (length, rows, groups, state).
    """

    y: Tensor
    ddrive: Tensor
    ddelta: Tensor
    dB: Tensor
    dC: Tensor


_T = TypeVar("_T", _Block, _Grads)


def _prepare(views: Views, *, softplus: bool) -> tuple[Tensor, _Block]:
    """Return delta before softplus, and a block."""
    raw = views.A.new_empty(views.u.shape)
    if views.bias is None:
        raw.copy_(views.delta)
    else:
        torch.add(views.delta, views.bias, out=raw)
    delta = F.softplus(raw) if softplus else raw
    drive = torch.mul(views.u, delta, out=torch.empty_like(raw))
    B, C = (raw.new_empty(x.shape).copy_(x) for x in (views.B, views.C))
    return raw, _Block(delta, drive, B, C)


def _vectors(x: Tensor) -> Tensor:
    return x.view(-1, 1, x.shape[-1])  # (steps, rows, groups, n) -> (steps rows groups, 1, n)


def _matrices(x: Tensor) -> Tensor:
    return x.view(-1, *x.shape[-2:])  # (..., state, width) -> (steps rows groups, state, width)


class Chunks:
    """The scan of some rows in one direction, chunk by chunk.

    Args:
        A: (groups, state, width).
        rows: Of the block.
        steps: Of a chunk; the last chunk of a sequence may have fewer.
        reverse: Start at the last step.
    """

    def __init__(self, A: Tensor, *, rows: int, steps: int, reverse: bool) -> None:
        self.A, self.rate = A, A * LOG2_E
        self.steps, self.reverse = steps, reverse
        self.buffers = A.new_empty(3, steps, rows, *A.shape)
        self.at_step = [buffer.unbind() for buffer in self.buffers]

    def forward(
        self, views: Views, out: Tensor, h: Tensor, kept: Tensor, *, softplus: bool
    ) -> None:
        """Scan from the state `h`, which is overwritten by the last state.

        Args:
            views: The inputs.
            out: Output for y, shaped like views.u.
            h: State, (rows, groups, state, width).
            kept: Output for the state before each chunk, (chunks, *h.shape), or with no rows.
            softplus: Whether delta goes through softplus.
        """
        _, block = _prepare(views, softplus=softplus)
        y = torch.empty_like(block.delta)
        chunks = kept, _split(block, self.steps), y.split(self.steps)
        for before, chunk, y_chunk in self._ordered(*chunks):
            if len(before):
                before.copy_(h)
            _, states = self._states(chunk, h)
            h.copy_(states[0 if self.reverse else -1])
            torch.bmm(_vectors(chunk.C), _matrices(states), out=_vectors(y_chunk))
        if views.D is not None:
            y.addcmul_(views.u, views.D)
        if views.z is None:
            out.copy_(y)
        else:
            torch.mul(y, F.silu(views.z.to(y.dtype)), out=out)

    def backward(
        self,
        views: Views,
        grads: Views,
        grad_y: Tensor,
        dh: Tensor,
        kept: Tensor,
        *,
        softplus: bool,
    ) -> None:
        """Backpropagate from the gradient `dh` of the last state, overwritten by the first's.

        Args:
            views: The inputs.
            grads: Outputs for their gradients; those of A, D and bias are accumulated.
            grad_y: Gradient of y, shaped like views.u.
            dh: Gradient of the last state, (rows, groups, state, width).
            kept: States before each chunk, (chunks, *dh.shape).
            softplus: Whether delta goes through softplus.
        """
        raw, block = _prepare(views, softplus=softplus)
        dy = torch.empty_like(raw)
        y = torch.empty_like(raw) if views.z is not None else raw.new_empty(len(raw), 0)
        if views.z is None:
            dy.copy_(grad_y)
        else:
            z = views.z.to(dy.dtype)
            gate = torch.sigmoid(z)
            slope = torch.addcmul(gate, z * gate, 1 - gate)
            torch.mul(grad_y, z * gate, out=dy)
        steps = _Grads(y, *(torch.empty_like(x) for x in (raw, raw, block.B, block.C)))
        chunks = kept, _split(block, self.steps), dy.split(self.steps), _split(steps, self.steps)
        for before, chunk, dy_chunk, out in self._ordered(*chunks, backward=True):
            self._backward_chunk(chunk, dy_chunk, before, dh, out, grads.A)

        if grads.z is not None:
            if views.D is not None:
                y.addcmul_(views.u, views.D)
            torch.mul(y.mul_(grad_y), slope, out=grads.z)
        steps.ddelta.addcmul_(steps.ddrive, views.u)
        if softplus:
            steps.ddelta.mul_(torch.sigmoid(raw))
        _write_grads(views, grads, steps, dy, steps.ddrive.mul_(block.delta))

    def _backward_chunk(
        self, chunk: _Block, dy: Tensor, before: Tensor, dh: Tensor, out: _Grads, dA: Tensor
    ) -> None:
        """Write `out`, accumulate dA, and backpropagate `dh` through the chunk."""
        _, states = self._states(chunk, before)
        if out.y.numel():
            torch.bmm(_vectors(chunk.C), _matrices(states), out=_vectors(out.y))
        torch.bmm(_vectors(dy), _matrices(states).mT, out=_vectors(out.dC))
        passed, dstates = self._gradients(dy, chunk.C, dh)
        torch.bmm(_vectors(chunk.drive), _matrices(dstates).mT, out=_vectors(out.dB))
        torch.bmm(_vectors(chunk.B), _matrices(dstates), out=_vectors(out.ddrive))

        first, rest, earlier = _step_slices(reverse=self.reverse)
        passed[rest].mul_(states[earlier])
        passed[first].mul_(before)  # now the gradient of delta A
        per_step = torch.mul(passed, chunk.delta.unsqueeze(3), out=states).flatten(2).flatten(0, 1)
        dA.view(1, -1).addmm_(per_step.new_ones(1, len(per_step)), per_step)
        torch.sum(torch.mul(passed, self.A, out=dstates), dim=3, out=out.ddelta)

    def _states(self, chunk: _Block, h: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the decay and the state of every step of a chunk that starts from `h`.

        Returns:
            The first two buffers, (steps, rows, groups, state, width).
        """
        decay, states, _ = self.buffers[:, : len(chunk.delta)]
        torch.mul(chunk.delta.unsqueeze(3), self.rate, out=decay).exp2_()
        torch.mul(chunk.drive.unsqueeze(3), chunk.B.unsqueeze(4), out=states)
        decay_at, state_at, _ = self.at_step
        for t in reversed(range(len(decay))) if self.reverse else range(len(decay)):
            h = state_at[t].addcmul_(decay_at[t], h)
        return decay, states

    def _gradients(self, dy: Tensor, C: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradient of every state of a chunk, and backpropagate `dh` through it.

        Returns:
            The first buffer, overwritten by the gradient of the state before each step, and the
            third, with that of the state after it.
        """
        later = dh
        steps = list(zip(*self.at_step, dy.unsqueeze(3), C.unsqueeze(4), strict=False))
        for decay_t, _, dstate_t, dy_t, C_t in steps if self.reverse else reversed(steps):
            later = decay_t.mul_(torch.addcmul(later, dy_t, C_t, out=dstate_t))
        dh.copy_(later)
        return self.buffers[0, : len(dy)], self.buffers[2, : len(dy)]

    def _ordered(self, *parts: Iterable[Any], backward: bool = False) -> Iterable[tuple[Any, ...]]:
        """Zip per-chunk sequences in the order of the scan, or against it."""
        chunks = list(zip(*parts, strict=True))
        return reversed(chunks) if self.reverse != backward else chunks


def _write_grads(views: Views, grads: Views, steps: _Grads, dy: Tensor, du: Tensor) -> None:
    """Write the gradients of the inputs other than A and z."""
    if views.D is not None and grads.D is not None:
        du.addcmul_(dy, views.D)
        grads.D.add_(dy.mul_(views.u).sum((0, 1)))
    if grads.bias is not None:
        grads.bias.add_(steps.ddelta.sum((0, 1)))
    grads.u.copy_(du)
    grads.delta.copy_(steps.ddelta)
    grads.B.copy_(steps.dB)
    grads.C.copy_(steps.dC)


def _split(block: _T, steps: int) -> list[_T]:
    return [type(block)(*x) for x in zip(*(y.split(steps) for y in block), strict=True)]


def _step_slices(*, reverse: bool) -> tuple[int, slice, slice]:
    """Index the first step of a scan, the others, and the steps before those."""
    return (-1, slice(-1), slice(1, None)) if reverse else (0, slice(1, None), slice(-1))


def unsupported(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Return why these tensors cannot be scanned in chunks, or None."""
    del u, A
    if B.dim() != 4 or C.dim() != 4:
        return "B or C is constant over time, expected one for each token"
    if B.shape[1] != C.shape[1]:
        return f"B has {B.shape[1]} groups and C {C.shape[1]}, expected the same"
    return None


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    softplus: bool,
    reverse: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scan like `selective_scan`, with B and C of shape (batch, groups, state, length).

    Returns:
        y, (batch, dim, length), and the state after the last step, (batch, dim, state).
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, last_state, _ = _forward(
        *tensors, softplus=softplus, reverse=reverse, out_dtype=out_dtype, keep=keep
    )
    return y, last_state


@custom_op(
    "fambav::chunked_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, ScalarType out_dtype, bool keep) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    *tensors: Any, softplus: bool, reverse: bool, out_dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and the states before each chunk (empty unless `keep`)."""
    u, views = tensors[0], Views.of(*tensors)
    (groups, state, width), (batch, dim, length) = views.A.shape, u.shape
    rows, steps = block_size(batch, dim, state, u.device)
    y = torch.empty_like(u, dtype=out_dtype)
    out = by_step(y, groups)
    h = views.A.new_zeros(batch, groups, state, width)
    kept = views.A.new_empty(-(-length // steps), batch if keep else 0, groups, state, width)
    for block in _blocks(batch, rows):
        chunks = Chunks(views.A, rows=len(h[block]), steps=steps, reverse=reverse)
        outputs = out[:, block], h[block], kept[:, block]
        chunks.forward(views.rows(block), *outputs, softplus=softplus)
    return y, h.mT.flatten(1, 2).contiguous(), kept


@custom_op(
    "fambav::chunked_scan_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_y, Tensor? grad_state, Tensor kept, {_INPUTS}) -> Tensor[]",
)
def _backward(
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    kept: Tensor,
    *tensors: Any,
    softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Return the gradients of the inputs that are not None, in order."""
    outputs: list[Any] = [None if x is None else torch.zeros_like(x) for x in tensors]
    views, grads = Views.of(*tensors), Views.of(*outputs)
    groups, state, width = views.A.shape
    batch = len(kept[0])
    rows, steps = block_size(batch, groups * width, state, kept.device)
    dy = torch.zeros_like(views.u) if grad_y is None else by_step(grad_y, groups)
    dh = views.A.new_zeros(batch, groups, state, width)
    if grad_state is not None:
        dh.copy_(grad_state.unflatten(1, (groups, width)).mT)
    for block in _blocks(batch, rows):
        chunks = Chunks(views.A, rows=len(dh[block]), steps=steps, reverse=reverse)
        state_of_block = dy[:, block], dh[block], kept[:, block]
        chunks.backward(views.rows(block), grads.rows(block), *state_of_block, softplus=softplus)
    outputs[2] = grads.A.mT.flatten(0, 1).contiguous()
    outputs[5], outputs[7] = (None if x is None else x.flatten() for x in (grads.D, grads.bias))
    pairs = zip(outputs, tensors, strict=True)
    return [dx.to(x.dtype) for dx, x in pairs if dx is not None]


def _blocks(batch: int, rows: int) -> list[slice]:
    return [slice(i, min(i + rows, batch)) for i in range(0, batch, rows)]


@_forward.register_fake
def _forward_shapes(u: Tensor, *rest: Any, **options: Any) -> Any:
    B: Tensor = rest[2]
    (batch, dim, length), (_, groups, state, _) = u.shape, B.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    count = -(-length // block_size(batch, dim, state, u.device)[1])
    rows = batch if options["keep"] else 0
    kept = u.new_empty(count, rows, groups, state, dim // groups, dtype=dtype)
    y = torch.empty_like(u, dtype=options["out_dtype"])
    return y, u.new_empty(batch, dim, state, dtype=dtype), kept


@_backward.register_fake
def _backward_shapes(grad_y: Any, grad_state: Any, kept: Any, *inputs: Any, **options: Any) -> Any:
    del grad_y, grad_state, kept, options
    return [torch.empty_like(x) for x in inputs if x is not None]


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[2])
    ctx.softplus, ctx.reverse = keyword_only_inputs["softplus"], keyword_only_inputs["reverse"]


def _gradient(ctx: Any, grad_y: Any, grad_state: Any, _: Any) -> Any:
    *inputs, kept = ctx.saved_tensors
    options = dict(softplus=ctx.softplus, reverse=ctx.reverse)
    grads = iter(_backward(grad_y, grad_state, kept, *inputs, **options))
    return tuple(None if x is None else next(grads) for x in inputs)


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(refuse(SCAN))
