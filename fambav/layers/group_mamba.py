"""The modulated group mixer of GroupMamba: each quarter of the channels is scanned one way.

    x' = norm(x)      a = sigmoid(fc2(relu(fc1(mean of x' over the cells))))   of each channel
    y = SS2D of each quarter of x': along rows, along columns, and both from their ends
    out = proj(norm(skip_scale * y * x' * a))

Source: Shaker et al., "GroupMamba", arXiv:2407.13772, section 3, as its code computes it: y is
multiplied by x', and both norms are one.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.layers.ss2d import SS2D, scan_groups
from fambav.ops.scan_paths import CROSS

SQUEEZE = 16  # channels for each number in between that the affinity is computed from


class GroupMambaMixer(nn.Module):
    """Scan four groups of channels in as many directions, and weigh channels by their means.

    Args:
        dim: Width of a cell, a multiple of 4 and at least 16.

    Raises:
        ValueError: If dim is another number.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % len(CROSS) or dim < SQUEEZE:
            raise ValueError(f"dim is {dim}, expected a multiple of 4 of at least {SQUEEZE}")
        # Names and order are those of the published weights.
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.fc1 = nn.Linear(dim, dim // SQUEEZE)
        self.fc2 = nn.Linear(dim // SQUEEZE, dim)
        self.norm = nn.LayerNorm(dim)
        for number, path in enumerate(CROSS, 1):
            self.add_module(f"mamba_g{number}", _one_way(dim // len(CROSS), path))
        self.proj = nn.Linear(dim, dim)

    @property
    def mixers(self) -> list[SS2D]:
        """The mixer of each group."""
        return [cast(SS2D, self.get_submodule(f"mamba_g{n + 1}")) for n in range(len(CROSS))]

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map, (batch, height, width, dim); the shape stays."""
        x = self.norm(x)
        squeezed = F.relu(self.fc1(x.mean(dim=(1, 2), keepdim=True)))
        affinity = torch.sigmoid(self.fc2(squeezed))  # (batch, 1, 1, dim)
        y = scan_groups(self.mixers, x) * self.skip_scale * x * affinity
        out: Tensor = self.proj(self.norm(y))
        return out


def _one_way(dim: int, path: str) -> SS2D:
    """Return a mixer with names in the order of the published weights."""
    mixer = SS2D(dim, gated=True, conv_bias=True, paths=(path,))
    for last in ("A_logs", "Ds", "in_proj", "conv2d", "out_proj"):
        part = getattr(mixer, last)
        delattr(mixer, last)
        setattr(mixer, last, part)
    return mixer
