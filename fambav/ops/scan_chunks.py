"""One chunk after another of a selective scan, forward and backward, in batched calls.

    decay, drive          the whole chunk at once, (steps, rows, groups, state, width)
    h = decay h + drive   one call per step
    y = C h               the whole chunk at once, a batch of vector-matrix products

Channels are the last axis, so that every call runs over contiguous numbers, and a chunk is so short
that its buffers stay near the cache.  The reverse direction takes chunks and steps from the end.

Source: the recurrence of Gu and Dao, "Mamba", arXiv:2312.00752, algorithm 2, and the recomputation
of its section 3.3.2; chunks of batched calls in place of one fused kernel are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = 1.4426950408889634  # exp2 is three times faster than exp
STEP_NUMBERS = 1 << 16  # in one step of a block: few enough for a cache, enough to pay for a call
CHUNK_NUMBERS = 5 << 17  # in one chunk of a block; three such buffers are in use
MAX_STEPS = 32  # in one chunk
GPU_STEPS = 16  # in one chunk of the whole batch, where calls cost more than numbers


def block_size(batch: int, dim: int, state: int, device: torch.device) -> tuple[int, int]:
    """Choose how many rows of the batch and how many steps to work on at once."""
    if device.type != "cpu":
        return max(1, batch), GPU_STEPS
    most = max(1, STEP_NUMBERS // (dim * state))
    rows = -(-batch // -(-batch // most)) if batch else 1
    return rows, max(1, min(MAX_STEPS, CHUNK_NUMBERS // (rows * dim * state)))


def by_step(x: Tensor, groups: int) -> Tensor:
    """View (batch, dim, length) as (length, batch, groups, width)."""
    steps: Tensor = x.unflatten(1, (groups, -1)).permute(3, 0, 1, 2)
    return steps


class Views(NamedTuple):
    """The inputs of a scan, or their gradients, step by step.

    u, delta and z are (length, batch, groups, width), B and C (length, batch, groups, state), D and
    bias (groups, width), and A is (groups, state, width).
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
        """View the tensors of a scan; A, D and bias may be copies, in the dtype of the state."""
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
    """What the steps of some rows need, contiguous and in the dtype of the state.

    delta is after softplus and drive is delta u, both (length, rows, groups, width).
    """

    delta: Tensor
    drive: Tensor
    B: Tensor
    C: Tensor


class _Found(NamedTuple):
    """What the backward steps give.

    y is without skip and gate, and empty if there is no gate to need it.  ddelta is only the part
    that comes through the decay.
    """

    y: Tensor
    ddrive: Tensor
    ddelta: Tensor
    dB: Tensor
    dC: Tensor


_T = TypeVar("_T", _Block, _Found)


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
    """View (steps, rows, groups, n) as a batch of row vectors, (-1, 1, n)."""
    return x.view(-1, 1, x.shape[-1])


def _matrices(x: Tensor) -> Tensor:
    """View (steps, rows, groups, state, width) as a batch of matrices, (-1, state, width)."""
    return x.view(-1, *x.shape[-2:])


class Chunks:
    """The steps of some rows in one direction, chunk by chunk.

    Args:
        A: Decay rate, (groups, state, width).
        rows: Rows of the batch.
        steps: Steps in a chunk; the last one of a sequence may have fewer.
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
        """Scan from the state `h`, which becomes the last state.

        Args:
            views: The inputs.
            out: Place for y, shaped like views.u.
            h: State, (rows, groups, state, width).
            kept: Place for the state before each chunk, (chunks, *h.shape), or without rows.
            softplus: Whether delta goes through softplus.
        """
        _, block = _prepare(views, softplus=softplus)
        y = torch.empty_like(block.delta)
        parts = kept, _split(block, self.steps), y.split(self.steps)
        for before, chunk, y_chunk in self._ordered(*parts):
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
        """Go back from the gradient `dh` of the last state, which becomes that of the first.

        Args:
            views: The inputs.
            grads: Places for their gradients; those of A, D and bias are added to.
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
        found = _Found(y, *(torch.empty_like(x) for x in (raw, raw, block.B, block.C)))
        parts = kept, _split(block, self.steps), dy.split(self.steps), _split(found, self.steps)
        for before, chunk, dy_chunk, into in self._ordered(*parts, backward=True):
            self._backward_chunk(chunk, dy_chunk, before, dh, into, grads.A)

        if grads.z is not None:
            if views.D is not None:
                y.addcmul_(views.u, views.D)
            torch.mul(y.mul_(grad_y), slope, out=grads.z)
        found.ddelta.addcmul_(found.ddrive, views.u)
        if softplus:
            found.ddelta.mul_(torch.sigmoid(raw))
        _hand_over(views, grads, found, dy, found.ddrive.mul_(block.delta))

    def _backward_chunk(
        self, chunk: _Block, dy: Tensor, before: Tensor, dh: Tensor, into: _Found, dA: Tensor
    ) -> None:
        """Fill `into`, add to dA, and let `dh` pass the chunk."""
        _, states = self._states(chunk, before)
        if into.y.numel():
            torch.bmm(_vectors(chunk.C), _matrices(states), out=_vectors(into.y))
        torch.bmm(_vectors(dy), _matrices(states).mT, out=_vectors(into.dC))
        passed, dstates = self._gradients(dy, chunk.C, dh)
        torch.bmm(_vectors(chunk.drive), _matrices(dstates).mT, out=_vectors(into.dB))
        torch.bmm(_vectors(chunk.B), _matrices(dstates), out=_vectors(into.ddrive))

        first, rest, earlier = _places(reverse=self.reverse)
        passed[rest].mul_(states[earlier])
        passed[first].mul_(before)  # now the gradient of delta A
        per_step = torch.mul(passed, chunk.delta.unsqueeze(3), out=states).flatten(2).flatten(0, 1)
        dA.view(1, -1).addmm_(per_step.new_ones(1, len(per_step)), per_step)
        torch.sum(torch.mul(passed, self.A, out=dstates), dim=3, out=into.ddelta)

    def _states(self, chunk: _Block, h: Tensor) -> tuple[Tensor, Tensor]:
        """Make the decay and the state of every step of a chunk that starts from `h`.

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
        """Make the gradient of the state of every step, and let `dh` pass the chunk.

        Returns:
            The first buffer, where the decay was, with the gradient of the state before each step
            (what each step passes on), and the third, with that of the state itself.
        """
        later = dh
        steps = list(zip(*self.at_step, dy.unsqueeze(3), C.unsqueeze(4), strict=False))
        for decay_t, _, dstate_t, dy_t, C_t in steps if self.reverse else reversed(steps):
            later = decay_t.mul_(torch.addcmul(later, dy_t, C_t, out=dstate_t))
        dh.copy_(later)
        return self.buffers[0, : len(dy)], self.buffers[2, : len(dy)]

    def _ordered(self, *parts: Iterable[Any], backward: bool = False) -> Iterable[tuple[Any, ...]]:
        """Go through the chunks, given what each of them needs."""
        chunks = list(zip(*parts, strict=True))
        return reversed(chunks) if self.reverse != backward else chunks


def _hand_over(views: Views, grads: Views, found: _Found, dy: Tensor, du: Tensor) -> None:
    """Give the inputs their gradients, but for A and z."""
    if views.D is not None and grads.D is not None:
        du.addcmul_(dy, views.D)
        grads.D.add_(dy.mul_(views.u).sum((0, 1)))
    if grads.bias is not None:
        grads.bias.add_(found.ddelta.sum((0, 1)))
    grads.u.copy_(du)
    grads.delta.copy_(found.ddelta)
    grads.B.copy_(found.dB)
    grads.C.copy_(found.dC)


def _split(block: _T, steps: int) -> list[_T]:
    return [type(block)(*x) for x in zip(*(y.split(steps) for y in block), strict=True)]


def _places(*, reverse: bool) -> tuple[int, slice, slice]:
    """Say where the first step taken is, where the others are, and the steps taken before those."""
    return (-1, slice(-1), slice(1, None)) if reverse else (0, slice(1, None), slice(-1))
