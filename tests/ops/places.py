"""Tensors of every layout to write into, and how close kernels come to float64."""

import torch

from tests.ops.agreement import TOLERANCE

LAYOUTS = ["plain", "transposed", "slice"]
CLOSE = TOLERANCE | {torch.float16: 5e-4}
if not torch.cuda.is_available():
    CLOSE[torch.bfloat16] = 8e-3  # Triton's interpreter cuts the digits off instead of rounding


def place(*shape, dtype=torch.float32, layout="plain", device="cpu"):
    """NaN to be written over; a slice lies within a wider tensor."""
    nan = float("nan")
    if layout == "plain":
        return torch.full(shape, nan, dtype=dtype, device=device)
    *outer, length, dim = shape
    if layout == "transposed":
        return torch.full((*outer, dim, length), nan, dtype=dtype, device=device).mT
    return torch.full((*outer, length + 2, dim + 3), nan, dtype=dtype, device=device)[
        ..., 1:-1, :-3
    ]


def like(tensor, layout):
    """The same numbers in another layout."""
    return place(*tensor.shape, dtype=tensor.dtype, layout=layout, device=tensor.device).copy_(
        tensor
    )


def unwritten_around(tensor):
    """Whether everything around a slice is still NaN."""
    base = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return base.isnan().sum().item() == base.numel() - tensor.numel()


def close(got, want):
    """Compare with the result in float64."""
    assert got.isfinite().all()
    error, scale = (got.cpu().double() - want).abs().max(), want.abs().max()
    assert error <= CLOSE[got.dtype] * scale, f"off by {error:.1e} of {scale:.1e}"
