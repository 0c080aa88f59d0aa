"""Non-causal state-space duality: one state for a whole sequence, which every token reads.

    w[t] = -A dt[t] size[t]
    H    = sum over all t of  B[t] (w[t] x[t])
    y[t] = C[t] H + D x[t]

Since H is a sum, the order of tokens means nothing, and both lines are matrix products.  A token of
size 0 adds nothing to H, as if it were not there; one that stands for n equal tokens adds what they
would with size n.

Source: Shi et al., "VSSD", arXiv:2407.18559, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fambav.ops.dispatch import expect_beside, without_autocast


def nc_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    size: Tensor | None = None,
) -> Tensor:
    """Sum all tokens of a sequence into a state, and read it at every token.

    The state is not normalised and grows with the length, so that it and the result leave the
    range of float16; both are float32, or float64 if x is, under autocast too.

    Args:
        x: Values, (batch, length, heads, head_dim), of any floating-point dtype.
        dt: Step size, at least 0, (batch, length, heads).
        A: Decay rate, negative, (heads,).
        B: Input matrix of all heads, (batch, length, state).
        C: Output matrix of all heads, shaped like B.
        D: Skip weight, (heads,).
        size: Tokens that each one stands for, (batch, length); 0 for none.  One each by default.

    Returns:
        y, shaped like x.  A token of size 0 gets one too.

    Raises:
        ValueError: If a shape, dtype or device does not fit that of x.
    """
    _check(x, A, B, {"dt": dt, "C": C, "D": D, "size": size})
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    weight = -A.to(dtype) * dt.to(dtype)  # (batch, length, heads)
    if size is not None:
        weight = weight * size.to(dtype).unsqueeze(2)
    with without_autocast(x):
        state = B.mT @ (x * weight.unsqueeze(3)).flatten(2)  # (batch, state, heads * head_dim)
        y = (C @ state).view_as(x)
    return y if D is None else y + x * D.to(dtype).unsqueeze(1)


def _check(x: Tensor, A: Tensor, B: Tensor, others: dict[str, Tensor | None]) -> None:
    """Check shapes, dtypes and devices.

    Raises:
        ValueError: If one does not fit that of x.
    """
    if x.ndim != 4 or not x.is_floating_point():
        kind = f"{tuple(x.shape)} of {x.dtype}"
        raise ValueError(f"x is {kind}, expected (batch, length, heads, head_dim) of floats")
    batch, length, heads, _ = x.shape
    shapes = {"dt": (batch, length, heads), "D": (heads,), "size": (batch, length)}
    shapes["C"] = (batch, length, B.shape[-1])
    expect_beside("A", A, (heads,), x)
    expect_beside("B", B, shapes["C"], x)
    for name, tensor in others.items():
        if tensor is not None:
            expect_beside(name, tensor, shapes[name], x)
