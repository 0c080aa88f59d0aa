"""PlainMamba's mixer and its convolutional stem.

    in_proj -> 7 x 7 convolution of each channel -> x_proj, dt_proj -> four scans -> out_proj

All scans share the projections.  Papers count all four scans, with 9 * length * inner * state and
length * inner each.

Source: Yang et al., "PlainMamba", arXiv:2403.17695, section 3 and table 1.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import nn

from fambav.costs.conventions import SCAN, Cost
from fambav.costs.parts import Parts
from fambav.models import PlainMamba
from fambav.models.plainmamba import Layer

SCANS = 4


class PlainMixer(NamedTuple):
    """The sizes of a mixer.

    Attributes:
        dim: Width of a token.
        inner: Width inside.
        state: Numbers of state per channel.
        rank: Width of what the step sizes are made from.
        kernel: Side of the convolution.
        behind: Side of a further convolution of each channel, behind the layer; 0 for none.
    """

    dim: int
    inner: int
    state: int
    rank: int
    kernel: int
    behind: int

    def cost(self, length: int, cells: int) -> Cost:
        """Return the cost of `length` tokens whose convolutions run on `cells` cells."""
        around = 3 * length * self.dim * self.inner
        projected = length * self.inner * (2 * self.rank + 2 * self.state)
        convolved = cells * (self.kernel**2 * self.inner + self.behind**2 * self.dim)
        scanned = SCAN * length * self.inner * self.state + length * self.inner
        products = around + projected + convolved
        whole = products + SCANS * scanned
        return Cost(literature=whole, all_directions=whole, multiply_adds=products)


def parts(model: PlainMamba) -> Parts:
    """Read the sizes of a PlainMamba off its layers; weights may be on the meta device."""
    mixers = tuple(_mixer(model.dim, cast(Layer, layer)) for layer in model.layers)
    return Parts(
        patches=Cost.plain(_stem(model.patch_embed, model.img_size)),
        mixers=mixers,
        head=Cost.plain(model.dim * model.num_classes),
        dim=model.dim,
        inner=mixers[0].inner,
        scans=SCANS,
        printed=SCANS,
        length=model.length,
        grid=model.grid,
    )


def _mixer(dim: int, layer: Layer) -> PlainMixer:
    """Read the sizes of one mixer."""
    rank, state, _ = layer.mamba.splits
    conv = layer.mamba.conv2d
    behind = [] if layer.dw is None else [m for m in layer.dw if isinstance(m, nn.Conv2d)]
    return PlainMixer(
        dim=dim,
        inner=conv.in_channels,
        state=state,
        rank=rank,
        kernel=conv.kernel_size[0],
        behind=sum(other.kernel_size[0] for other in behind),
    )


def _stem(stem: nn.Module, size: tuple[int, int]) -> int:
    """Add up the convolutions of the stem, each at the size that it leaves to the next."""
    products, (height, width) = 0, size
    for conv in stem.modules():
        if isinstance(conv, nn.Conv2d):
            height, width = (_steps(conv, n, side) for n, side in enumerate((height, width)))
            products += height * width * conv.weight.numel()
    return products


def _steps(conv: nn.Conv2d, axis: int, side: int) -> int:
    """Return the places that a convolution takes along a side."""
    padding = cast("tuple[int, int]", conv.padding)[axis]
    return (side + 2 * padding - conv.kernel_size[axis]) // conv.stride[axis] + 1
