"""The recurrence inside a selective scan as one operation, which every format puts in its own way.

    h[t] = exp(step[t] A) h[t-1] + drive[t] B[t]        y[t] = C[t] h[t]

Everything around it (bias, softplus, skip, gate, direction) is plain operations already here.  In
plain operations it is as many blocks of as many steps, about the square root of the length of each:

    in all blocks at once, from zero   h'[t] = exp(step[t] A) h'[t-1] + drive[t] B[t]
    from block to block                before[k+1] = age[last of k] before[k] + h'[last of k]
    everywhere at once                 h[t] = h'[t] + age[t] before[block of t]

Source: the recurrence of Gu and Dao, "Mamba", arXiv:2312.00752, algorithm 2; the scan in two levels
is the textbook's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

torch.library.define(
    "fambav::recurrence",
    "(Tensor step, Tensor drive, Tensor A, Tensor B, Tensor C) -> Tensor",
)


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
    """Scan as `selective_scan` says, with B and C of shape (batch, groups, state, length).

    Returns:
        y, (batch, dim, length), and no state.

    Raises:
        ValueError: If B or C has another shape.
    """
    for name, weight in (("B", B), ("C", C)):
        if weight.dim() != 4 or weight.shape[1] != B.shape[1]:
            raise ValueError(f"{name} has no tokens or other groups, expected those of B and C")
    x, step = u.permute(2, 0, 1), delta.permute(2, 0, 1)
    step = step if delta_bias is None else step + delta_bias
    step = F.softplus(step) if softplus else step
    parts = [step, step * x, *(weight.permute(3, 0, 1, 2) for weight in (B, C))]
    step, drive, B, C = [part.flip(0) for part in parts] if reverse else parts
    y: Tensor = _of_groups(step, drive, A, B, C)
    y = y.flip(0) if reverse else y
    y = (y if D is None else y + D * x).permute(1, 2, 0)
    y = y if z is None else y * F.silu(z)
    return y.to(out_dtype), u.new_empty(0)


def _of_groups(step: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Run the recurrence with B and C for groups of channels, (length, batch, groups, state)."""
    run, groups = torch.ops.fambav.recurrence, B.shape[2]
    if groups > 1 and A.shape[1] == 1:  # B and C only scale channels: one recurrence of all
        each = step.shape[2] // groups
        into, out = (w.expand(-1, -1, -1, each).flatten(2) for w in (B, C))
        one = torch.ones_like(B[:, :, 0])
        scaled: Tensor = run(step, drive * into, A, one, one) * out
        return scaled
    own = zip(step.chunk(groups, 2), drive.chunk(groups, 2), A.chunk(groups), strict=True)
    ys = [run(*parts, B[:, :, n], C[:, :, n]) for n, parts in enumerate(own)]
    return ys[0] if groups == 1 else torch.cat(ys, dim=2)


def in_blocks(step: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Run the recurrence in plain operations, about twice the square root of the length of them.

    Args:
        step: Step size, (length, batch, dim), at least 0; length is a fixed number.
        drive: Step size times input, shaped like step.
        A: Decay rate, (dim, state), negative.
        B: Weight into the state, (length, batch, state).
        C: Weight out of it, shaped like B.

    Returns:
        y, shaped like step.
    """
    length, rate = step.shape[0], A.mT
    steps = -(-length // max(1, math.isqrt(length)))
    blocks = -(-length // steps)
    rest = (0, 0, 0, 0, 0, blocks * steps - length)
    step, drive, B, C = (F.pad(x, rest).unflatten(0, (blocks, steps)) for x in (step, drive, B, C))
    decay = torch.exp(step.unsqueeze(3) * rate)  # (blocks, steps, batch, state, dim)
    states = [torch.zeros_like(decay[:, 0])]
    for kept, given in zip(
        decay.unbind(1), (drive.unsqueeze(3) * B.unsqueeze(4)).unbind(1), strict=True
    ):
        states.append(torch.addcmul(given, kept, states[-1]))
    inside = torch.stack(states[1:], 1)
    if blocks > 1:
        age = torch.exp(step.cumsum(1).unsqueeze(3) * rate)
        before = [torch.zeros_like(inside[0, 0])]
        for kept, given in zip(age[:-1, -1].unbind(0), states[-1][:-1].unbind(0), strict=True):
            before.append(torch.addcmul(given, kept, before[-1]))
        inside = torch.addcmul(inside, age, torch.stack(before).unsqueeze(1))
    return (C.unsqueeze(3) @ inside).squeeze(3).flatten(0, 1)[:length]


def _shape(step: Tensor, *_: Tensor) -> Tensor:
    return step.new_empty(step.shape)


torch.library.register_fake("fambav::recurrence", _shape)
torch.library.impl("fambav::recurrence", "default", in_blocks)
