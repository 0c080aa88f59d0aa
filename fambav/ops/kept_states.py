"""Shapes of the states that the scan kernels keep for the backward pass.

They are known without the kernels: torch.export needs them in the middle of a trace, where a
compiler cannot be imported.
"""

from __future__ import annotations

import torch

TRITON_CHUNK = 16  # tokens from one kept state to the next
NUMBA_CHUNK = 32


def state_parts(state: int) -> tuple[int, int]:
    """Return the width and the number of the parts that Triton's kernels split a state into."""
    padded = 1 << (state - 1).bit_length()
    width = min(padded, 4)
    return width, padded // width


def kept_dtype(tokens: torch.dtype) -> torch.dtype:
    """Return the dtype of what Triton's kernels keep in a mixer of these tokens.

    The backward pass recomputes a chunk from a kept state, whose rounding to bfloat16 is that of
    u, B and C; the range of float16 is not that of a state.
    """
    return torch.bfloat16 if tokens == torch.bfloat16 else torch.float32


def triton_shape(
    directions: int, batch: int, length: int, dim: int, state: int, *, chunk: int = TRITON_CHUNK
) -> tuple[int, ...]:
    """Return the shape with a state after every chunk but the last."""
    width, parts = state_parts(state)
    return directions, batch, (length - 1) // chunk, parts, dim, width


def numba_shape(
    directions: int, batch: int, length: int, dim: int, state: int
) -> tuple[int, int, int, int]:
    """Return the shape with a state before every chunk."""
    return directions, batch, -(-length // NUMBA_CHUNK) * state, dim
