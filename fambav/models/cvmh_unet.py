"""CVMH-UNet: a U of scans along rows, columns and diagonals beside convolutions.

    block    u = x + conv1x1(norm(dwconv(channels(scan(x)) + cells(conv(x)))))    y = u + ffn(u)
    fusion   z = w f + (1 - w) g,  w in (0, 1) of frequencies of the channels of f + g, and of cells

Built from the paper: its authors have released no code.  What it leaves open is chosen as the table
in the documentation says, so that parameters and operations are those that the paper prints.

Source: Cao et al., "CVMH-UNet", arXiv:2410.05624.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fambav.layers.attention import FINEST, ChannelAttention, FrequencyAttention, SpatialAttention
from fambav.layers.hierarchy import Blocks
from fambav.models.entry import register
from fambav.models.flops import Cost, map_cost, total
from fambav.models.segmenter import SIZES, Segmenter, as_published
from fambav.models.vmunet import VSSBlock, vss_cost
from fambav.ops.scan_paths import SLANTED

RATIO = 4  # channels for each hidden one


class ConvFFN(nn.Module):
    """Two neighbourhoods of each cell between two linear maps, with batch norms.

    Args:
        dim: Channels; a quarter of them inside.

    Source: Wu et al., "CMTFNet", IEEE TGRS 2023, the efficient feed-forward network.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(dim // RATIO, 1)
        self.reduce = _normed(nn.Conv2d(dim, hidden, 1, bias=False))
        self.wide = _normed(_depthwise(hidden, 5))
        self.narrow = _normed(_depthwise(hidden, 3))
        self.expand = _normed(nn.Conv2d(hidden, dim, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, dim, height, width); the shape stays."""
        x = F.relu6(self.reduce(x))
        x = F.relu6(self.wide(x)) + F.relu6(self.narrow(x))
        return F.relu6(self.expand(x))


class CVSSBlock(VSSBlock):
    """A scan of the map beside a convolution, and a feed-forward network.

    Stochastic depth acts on the branch of the scan, and on each of the two sums.  Gradient
    checkpointing computes the scan again; batch norms run once.

    Args:
        dim: Width of a cell.
        paths: Of `fambav.ops.scan_paths.PATHS`.
        drop_path: Probability that a sample skips a branch.

    Source: the paper's equations 1 to 4.
    """

    def __init__(
        self, dim: int, *, paths: tuple[str, ...] = SLANTED, drop_path: float = 0.0
    ) -> None:
        super().__init__(dim, paths=paths, drop_path=drop_path)
        self.channel_attention = ChannelAttention(dim)
        pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.local = nn.Sequential(_depthwise(dim, 3), pointwise, nn.BatchNorm2d(dim))
        self.spatial_attention = SpatialAttention()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.ffn = ConvFFN(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, height, width, dim); the shape stays."""
        scanned = super().forward(x).permute(0, 3, 1, 2)
        x = x.permute(0, 3, 1, 2)  # (batch, dim, height, width) from here
        local = self.spatial_attention(self.local(x))
        both = self.dwconv(self.channel_attention(scanned) + local)
        normed = self.norm(both.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.drop_path(self.proj(normed))
        x = x + self.drop_path(self.ffn(x))
        return x.permute(0, 2, 3, 1)


class PairedBlocks(Blocks):
    """Blocks of which each two in a row are one residual branch: x + second(first(x))."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no cell goes
        """Run all blocks on a map, whose shape stays; a last one without a partner as it is."""
        blocks = list(self)
        for first, second in zip(blocks[::2], blocks[1::2], strict=False):
            x = x + second(first(x))
        if len(blocks) % 2:
            x = blocks[-1](x)
        return x


class MFMSBlock(nn.Module):
    """Mix two maps, cell by cell and channel by channel, by weights in (0, 1).

    Args:
        dim: Width of a cell.
        side: Of the grid of which frequencies are taken, a multiple of 7.

    Source: the paper's equations 5 to 10.
    """

    def __init__(self, dim: int, *, side: int) -> None:
        super().__init__()
        hidden = max(dim // RATIO, 1)
        self.channels = FrequencyAttention(dim, side=side)
        self.cells = nn.Sequential(
            OrderedDict[str, nn.Module](
                reduce=_normed(nn.Conv2d(dim, hidden, 1)),
                act=nn.ReLU(),
                expand=_normed(nn.Conv2d(hidden, dim, 1)),
            )
        )

    def weights(self, x: Tensor) -> Tensor:
        """Return weights in (0, 1) of a map, both (batch, dim, height, width)."""
        logits: Tensor = self.channels(x)[:, :, None, None] + self.cells(x)
        return logits.sigmoid()

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        """Return w skip + (1 - w) x, all (batch, height, width, dim)."""
        weight = self.weights((skip + x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # Where both are equal, so is the result, to the last bit.
        return x + weight * (skip - x)


class CVMHUNet(Segmenter):
    """Mixes the maps of the encoder and of the decoder by learnt weights, at all levels.

    Args:
        paths: In which orders the scans read a map, of `fambav.ops.scan_paths.PATHS`.
        arguments: As of `Segmenter`.
    """

    family = "cvmh_unet"
    decoder = (*Segmenter.decoder, "fusions")

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        depths_up: Sequence[int],
        paths: Sequence[str] = SLANTED,
        img_size: int | Sequence[int] = 256,
        in_chans: int = 3,
        num_classes: int = 6,
        global_pool: str | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        self.paths = tuple(paths)
        super().__init__(
            dims=dims,
            depths=depths,
            depths_up=depths_up,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_path_rate=drop_path_rate,
        )
        sides = [FINEST * 2**level for level in reversed(range(len(self.dims)))]
        blocks = [MFMSBlock(dim, side=side) for dim, side in zip(self.dims, sides, strict=True)]
        self.fusions = nn.ModuleList(blocks)

    def make_blocks(self, dim: int, rates: Sequence[float]) -> Blocks:
        """Return the blocks of a stage; see `Segmenter`."""
        return PairedBlocks([CVSSBlock(dim, paths=self.paths, drop_path=rate) for rate in rates])

    def fuse(self, level: int, skip: Tensor, x: Tensor) -> Tensor:
        """Return the mixture of both maps; see `Segmenter`."""
        fused: Tensor = self.fusions[level](skip, x)
        return fused

    def fuse_cost(self, level: int, grid: tuple[int, int]) -> Cost:
        """Return the cost of `fuse` on maps of a height and width."""
        fusion, dim = cast(MFMSBlock, self.fusions[level]), self.dims[level]
        number, side, _ = fusion.channels.bases.shape
        read = math.prod(_read_by_bins(length, side) for length in grid)
        averaged = dim * (read + side**2) + number * dim * (side**2 + 1)
        convolved = 3 * dim * fusion.channels.conv.weight.numel()
        return total(
            as_published(map_cost(fusion.cells, grid), (fusion.cells, grid)),
            Cost(averaged + convolved, convolved, convolved),
        )

    def block_cost(self, block: nn.Module, grid: tuple[int, int]) -> Cost:
        """Return the cost of a block on a map of a height and width."""
        known = cast(CVSSBlock, block)
        parts: list[nn.Module] = [known.local, known.spatial_attention, known.dwconv]
        parts += [known.norm, known.proj, known.ffn]
        counted = [(part, grid) for part in (known.ln_1, known.self_attention, *parts)]
        true = total(vss_cost(known, grid), *(map_cost(part, grid) for part in parts))
        averaged = known.ln_1.weight.numel() * (math.prod(grid) + 1)
        return total(
            as_published(true, *counted),
            Cost.of_products(2 * map_cost(known.channel_attention, (1, 1)).multiply_adds),
            Cost(literature=averaged),
        )


def _read_by_bins(length: int, bins: int) -> int:
    """Return how many cells of a side the bins of an adaptive average read, shared ones twice."""
    return sum(-(-(n + 1) * length // bins) - n * length // bins for n in range(bins))


def _normed(conv: nn.Conv2d) -> nn.Sequential:
    norm = nn.BatchNorm2d(conv.out_channels)
    return nn.Sequential(OrderedDict[str, nn.Module](conv=conv, bn=norm))


def _depthwise(dim: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)


VARIANTS: dict[str, dict[str, Any]] = {
    "cvmh_unet": {**SIZES, "dims": (96, 192, 384, 768)},
    "cvmh_unet_nano": {**SIZES, "dims": (16, 32, 64, 128), "img_size": 32},
}
globals().update(register(CVMHUNet, VARIANTS))
