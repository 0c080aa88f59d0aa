"""Vim's mixer: two projections, and a convolution, two projections and a scan each way.

Source: Zhu et al., "Vision Mamba", arXiv:2401.09417, section 3.4.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import nn

from fambav.costs.conventions import SCAN, Cost
from fambav.costs.parts import Parts
from fambav.layers.mamba import Mamba
from fambav.models import Vim


class VimMixer(NamedTuple):
    """The sizes of a mixer.

    Attributes:
        dim: Width of a token.
        inner: Width inside.
        state: Numbers of state per channel.
        rank: Width of what the step sizes are made from.
        kernel: Length of the convolution.
        branches: Convolutions with their projections, 2 if each direction has its own.
        scans: Directions that are scanned, 1 or 2.
    """

    dim: int
    inner: int
    state: int
    rank: int
    kernel: int
    branches: int
    scans: int

    def cost(self, length: int, cells: int) -> Cost:
        """Return the cost of `length` tokens.

        Papers count the convolution at every place of the padded sequence, `kernel - 1` more than
        there are tokens.
        """
        del cells  # its convolution follows the sequence
        around = 3 * length * self.dim * self.inner  # in_proj to twice the inner width, out_proj
        widths = self.rank + 2 * self.state
        projected = length * self.inner * (widths + self.rank)
        convolved, padded = (
            n * self.inner * self.kernel for n in (length, length + self.kernel - 1)
        )
        scanned = SCAN * length * self.inner * self.state + 2 * length * self.inner
        products = around + self.branches * (convolved + projected)
        return Cost(
            literature=around + padded + projected + scanned,
            all_directions=products + self.scans * scanned,
            multiply_adds=products,
        )


def parts(model: Vim) -> Parts:
    """Read the sizes of a Vim off its layers; weights may be on the meta device."""
    mixers = tuple(_mixer(model.dim, cast(Mamba, layer.mixer)) for layer in model.layers)
    patches = model.grid[0] * model.grid[1]
    return Parts(
        patches=Cost.plain(patches * model.patch_embed.proj.weight.numel()),
        mixers=mixers,
        head=Cost.plain(model.dim * model.num_classes),
        dim=model.dim,
        inner=mixers[0].inner,
        scans=mixers[0].scans,
        printed=1,
        length=model.length,
        grid=model.grid,
    )


def _mixer(dim: int, mixer: Mamba) -> VimMixer:
    """Read the sizes of one mixer."""
    rank, state, _ = mixer.splits
    conv: nn.Conv1d = mixer.conv1d
    return VimMixer(
        dim=dim,
        inner=conv.in_channels,
        state=state,
        rank=rank,
        kernel=conv.kernel_size[0],
        branches=2 if mixer.bimamba_type == "v2" else 1,
        scans=1 if mixer.bimamba_type == "none" else 2,
    )
