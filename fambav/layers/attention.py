"""Weights of channels and of cells that convolutional blocks give to a map, and DCT bases.

A map is (batch, channels, height, width) here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FINEST = 7  # sides of a grid of which the frequencies are named
# Rows and columns of the frequencies that classify best alone, the best one first.
TOP_FREQUENCIES = (
    *((0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0)),
    *((5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2)),
)


class ChannelAttention(nn.Module):
    """Weigh channels by their means and maxima over the map.

    Args:
        dim: Channels.
        ratio: Channels for each hidden one.

    Source: Woo et al., "CBAM", arXiv:1807.06521, section 3.
    """

    def __init__(self, dim: int, *, ratio: int = 16) -> None:
        super().__init__()
        hidden = max(dim // ratio, 1)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh: (batch, dim, height, width); the shape stays."""
        pooled = torch.stack([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))])  # (2, batch, dim)
        weight: Tensor = self.fc2(F.relu(self.fc1(pooled))).sum(dim=0).sigmoid()
        return x * weight[:, :, None, None]


class SpatialAttention(nn.Module):
    """Weigh cells by the means and maxima over channels around them.

    Args:
        kernel: Side of the neighbourhood.

    Source: as `ChannelAttention`.
    """

    def __init__(self, *, kernel: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh: (batch, dim, height, width); the shape stays."""
        pooled = torch.stack([x.mean(dim=1), x.amax(dim=1)], dim=1)  # (batch, 2, height, width)
        weight: Tensor = self.conv(pooled).sigmoid()
        return x * weight


def dct_bases(side: int, frequencies: tuple[tuple[int, int], ...] = TOP_FREQUENCIES) -> Tensor:
    """Return two-dimensional DCT bases, (number, side, side), float32.

        basis[h, w] = wave(u, h) wave(v, w)
        wave(u, p) = cos(pi u (p + 1/2) / side) / sqrt(side), times sqrt(2) if u > 0

    Args:
        side: Of the grid, a multiple of 7.
        frequencies: Of a grid of 7 x 7, scaled to this one.

    Source: Qin et al., "FcaNet", arXiv:2012.11879, equation 5.
    """
    place, scale = torch.arange(side, dtype=torch.float64) + 0.5, side // FINEST

    def wave(frequency: int) -> Tensor:
        u = frequency * scale
        scale_to_one: float = ((2 if u else 1) / side) ** 0.5
        return (math.pi * u * place / side).cos() * scale_to_one

    return torch.stack([wave(u)[:, None] * wave(v) for u, v in frequencies]).float()


class FrequencyAttention(nn.Module):
    """Logits of channels by their means, maxima and minima in several frequencies.

    A map is first averaged to a grid, so that its size may be any.

    Args:
        dim: Channels.
        side: Of the grid, a multiple of 7.

    Source: Nam et al., "MADGNet", arXiv:2405.06284, for the pooling; Wang et al., "ECA-Net",
    arXiv:1910.03151, for the convolution over channels.
    """

    bases: Tensor

    def __init__(self, dim: int, *, side: int) -> None:
        super().__init__()
        self.register_buffer("bases", dct_bases(side), persistent=False)
        kernel = int(math.log2(dim) / 2 + 0.5)
        kernel += 1 - kernel % 2  # odd
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (batch, dim), of a map, (batch, dim, height, width)."""
        grid = F.adaptive_avg_pool2d(x, self.bases.shape[-1]).flatten(2)  # (batch, dim, cells)
        bases = self.bases.flatten(1)  # (frequencies, cells)
        mean = grid @ (bases.mean(dim=0) / bases.shape[1])
        ends = (_extremes(grid, bases, largest=largest).mean(dim=2) for largest in (True, False))
        pooled = torch.stack([mean, *ends], dim=1)  # (batch, 3, dim)
        logits: Tensor = self.conv(pooled.flatten(0, 1)[:, None]).view(pooled.shape).sum(dim=1)
        return logits


def _extremes(grid: Tensor, bases: Tensor, *, largest: bool) -> Tensor:
    """Return the maxima or minima over cells of a grid times each basis.

    Their places come first, without a gradient: then no product of all cells has to be kept.

    Args:
        grid: (batch, dim, cells).
        bases: (frequencies, cells).
        largest: Whether maxima are wanted.

    Returns:
        (batch, dim, frequencies).
    """
    places_of = torch.argmax if largest else torch.argmin
    with torch.no_grad():
        places = torch.stack([places_of(grid * basis, dim=2) for basis in bases], dim=2)
    rows = bases.shape[1] * torch.arange(len(bases), device=bases.device)
    return grid.gather(2, places) * bases.flatten()[places + rows]
