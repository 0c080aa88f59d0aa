"""Random removal of features, the same for a sample on any number of processes.

A global batch is dealt over `count` shards: sample j of shard `index` is sample j * count + index.
Every shard draws the numbers of the whole batch and keeps its own, so that processes which start
from one seed drop what a single process would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fambav.arguments import probability


class _Current:
    """The shard in force."""

    index: int | Tensor = 0
    count = 1


@contextmanager
def shard(index: int | Tensor, count: int) -> Iterator[None]:
    """Draw as shard `index` of `count` while inside.

    Args:
        index: This process's share of the global batch, 0 .. count - 1; or a tensor of that one
            number, which a CUDA graph reads at each replay.
        count: Number of shards of the same size.

    Raises:
        ValueError: If index is outside 0 .. count - 1.
    """
    if not isinstance(index, Tensor) and not 0 <= index < count:
        raise ValueError(f"index is {index}, expected 0 to {count - 1}, one less than count")
    before = _Current.index, _Current.count
    _Current.index, _Current.count = index, count
    try:
        yield
    finally:
        _Current.index, _Current.count = before


def current() -> tuple[int | Tensor, int]:
    """Return the index and the count of the shard in force."""
    return _Current.index, _Current.count


def uniform(x: Tensor, *shape: int) -> Tensor:
    """Draw numbers in [0, 1) for the samples of `x`, (len(x), *shape), float32."""
    index, count = current()
    numbers = torch.rand(len(x) * count, *shape, device=x.device)
    if isinstance(index, Tensor):
        own: Tensor = numbers.unflatten(0, (len(x), count)).index_select(1, index).squeeze(1)
        return own
    return numbers[index::count]


class _Drop(nn.Module):
    """Something that drops a share of its input while training."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = probability("drop rate", rate)

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate:.3g}"

    def mask(self, x: Tensor, *shape: int) -> Tensor:
        """Return 0 with probability `rate` and 1 / (1 - rate) otherwise, (len(x), *shape)."""
        keep = 1 - self.rate
        return (uniform(x, *shape) < keep).to(x.dtype) / keep


class DropPath(_Drop):
    """Stochastic depth: zero whole samples, and scale the others to keep the mean.

    Args:
        rate: Probability of zero, at least 0 and less than 1.

    Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv:1603.09382.
    """

    def factor(self, x: Tensor) -> Tensor | None:
        """Draw what each sample of x is multiplied by, (len(x),), float32; None for 1."""
        if not (self.training and self.rate):
            return None
        keep = 1 - self.rate
        return (uniform(x) < keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of x, (batch, length, dim) or (batch, height, width, dim)."""
        return x * self.mask(x, *[1] * (x.ndim - 1)) if self.training and self.rate else x


class Dropout(_Drop):
    """Zero single numbers, and scale the others to keep the mean.

    Args:
        rate: Probability of zero, at least 0 and less than 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop numbers of x, (batch, length, dim)."""
        return x * self.mask(x, *x.shape[1:]) if self.training and self.rate else x
