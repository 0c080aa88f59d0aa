"""Parameters of a bidirectional mixer as its kernels take them, and the gradients back.

What is here is made of PyTorch's own operations; `fambav.ops.triton.parameters` does the same in
one kernel each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROW = 16  # the width of the projection is a multiple of it, so that B, C and dt are aligned


class Packed(NamedTuple):
    """Parameters that matrix products and scans read, both directions in one tensor.

    Attributes:
        x_proj: (2, row, dim), whose rows are B, C, dt and zeros, in the dtype of the tokens.
        dt_proj: (2, dim, row - 2 state), zeros behind the rank, likewise.
        A: Decay rates, (2, dim, state), float32, with any strides.
        out_proj: (out, dim), in the dtype of the tokens; None for none.
    """

    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    out_proj: Tensor | None


class Parts(NamedTuple):
    """Gradients of both directions that are not summed yet: each (2, parts, ...).

    Attributes:
        conv_weight: (2, parts, dim, width).
        conv_bias: (2, parts, dim).
        x_proj: (2, parts, row, dim), whose rows are as packed.
        dt_proj: (2, parts, dim, row - 2 state), likewise.
        dt_bias: (2, parts, dim).
        A: (2, parts, dim, state).
        D: (2, parts, dim).
    """

    conv_weight: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor


def row_width(rank: int, state: int) -> int:
    """Return the padded width of the projection."""
    return -(-(rank + 2 * state) // ROW) * ROW


def pack_parameters(
    x_proj: Sequence[Tensor],
    dt_proj: Sequence[Tensor],
    A: Sequence[Tensor],
    out_proj: Tensor | None,
    *,
    dtype: torch.dtype,
    log_A: bool,
) -> Packed:
    """Reorder, pad and cast.

    Args:
        x_proj: (rank + 2 state, dim) of each direction, rows dt, B and C.
        dt_proj: (dim, rank) of each direction.
        A: (dim, state) of each direction.
        out_proj: (out, dim), or None.
        dtype: Of the tokens.
        log_A: Whether A is the logarithm of its negative.
    """
    (used, dim), rank = x_proj[0].shape, dt_proj[0].shape[1]
    padding = row_width(rank, A[0].shape[1]) - used
    zeros = x_proj[0].new_zeros(padding, dim)
    rows = torch.cat([part for w in x_proj for part in (w[rank:], w[:rank], zeros)])
    rates = torch.stack([rate.T for rate in A]).float()  # channels last, as kernels for CPUs read
    return Packed(
        x_proj=rows.view(2, used + padding, dim).to(dtype),
        dt_proj=F.pad(torch.stack(list(dt_proj)), (0, padding)).to(dtype),
        A=(rates.exp_().neg_() if log_A else rates).mT,
        out_proj=None if out_proj is None else out_proj.to(dtype).contiguous(),
    )


def finish_gradients(
    parts: Parts, A: Tensor | None, *, rank: int, dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Sum parts, and give them the order and the dtypes of the parameters.

    Args:
        parts: The gradients.
        A: Decay rates, (2, dim, state), if A was given as the logarithm of its negative, else None.
        rank: Width of dt.
        dtypes: Of the results.

    Returns:
        The gradients of the parameters in the order of `Parts`, each (2, *shape), contiguous.
    """
    sums = [part[:, 0] if part.shape[1] == 1 else part.float().sum(dim=1) for part in parts]
    totals = Parts(*sums)
    state = totals.A.shape[2]
    B_C, dt = totals.x_proj[:, : 2 * state], totals.x_proj[:, 2 * state : 2 * state + rank]
    totals = totals._replace(
        x_proj=torch.cat((dt, B_C), dim=1),
        dt_proj=totals.dt_proj[..., :rank],
        A=totals.A if A is None else totals.A * A,
    )
    return [x.to(dtype).contiguous() for x, dtype in zip(totals, dtypes, strict=True)]
