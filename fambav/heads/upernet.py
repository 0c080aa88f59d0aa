"""UPerNet's head and the fully convolutional one that helps to train it.

    maps -> laterals (the coarsest with a pooled pyramid) -> top-down sums -> 3 x 3 -> logits

Source: Xiao et al., "Unified perceptual parsing", arXiv:1807.10221; Long et al., arXiv:1411.4038.
Names and order of the parameters are those of mmsegmentation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.arguments import whole
from fambav.layers.drop import Dropout
from fambav.models.flops import Cost, map_cost, total

POOLED = (1, 2, 3, 6)  # sides of the grids of the pyramid


class ConvNorm(nn.Sequential):
    """A convolution without a bias, a batch norm and a ReLU; sides stay.

    Args:
        in_channels, out_channels: Of the convolution.
        kernel: Its side, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        parts = {"conv": conv, "bn": nn.BatchNorm2d(out_channels), "activate": nn.ReLU()}
        super().__init__(OrderedDict[str, nn.Module](parts))


class ChannelDropout(Dropout):
    """Zero whole channels, and scale the others to keep the mean."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop channels of x, (batch, channels, height, width)."""
        return x * self.mask(x, x.shape[1], 1, 1) if self.training and self.rate else x


class PixelHead(nn.Module):
    """The last layer of a head; its parameters come first.

    Args:
        channels: Of the map that logits are made of.
        num_classes: Logits of a pixel.
        drop_rate: Share of channels that training drops.
    """

    def __init__(self, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = whole("num_classes", num_classes, least=1)
        self.channels = whole("channels", channels, least=1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.conv_seg.bias))
        self.drop = ChannelDropout(drop_rate)

    def classify(self, x: Tensor) -> Tensor:
        """Return logits, (batch, num_classes, height, width), of (batch, channels, ...)."""
        logits: Tensor = self.conv_seg(self.drop(x))
        return logits


class UPerHead(PixelHead):
    """Logits at the resolution of the finest map.

    Args:
        in_channels: Channels of each map, the finest one first.
        num_classes: Logits of a pixel.
        channels: Of all maps inside.
        drop_rate: Share of channels that training drops before the last layer.

    Raises:
        ValueError: If there are fewer than two maps, or a number is below 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, drop_rate)
        if len(in_channels) < 2:
            raise ValueError(f"in_channels are {list(in_channels)}, expected two maps or more")
        *finer, coarsest = in_channels
        pyramid = [
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNorm(coarsest, channels, 1))
            for side in POOLED
        ]
        self.psp_modules = nn.ModuleList(pyramid)
        self.bottleneck = ConvNorm(coarsest + len(POOLED) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNorm(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits, (batch, num_classes, height, width) of the first map.

        Args:
            maps: (batch, in_channels[n], height, width), the finest one first.
        """
        *finer, coarsest = maps
        pooled = [resized(module(coarsest), coarsest) for module in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        laterals.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for n in reversed(range(len(finer))):
            laterals[n] = laterals[n] + resized(laterals[n + 1], laterals[n])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
        outputs = [resized(x, outputs[0]) for x in (*outputs, laterals[-1])]
        return self.classify(self.fpn_bottleneck(torch.cat(outputs, dim=1)))

    def cost(self, grids: Sequence[tuple[int, int]]) -> Cost:
        """Return the cost of `forward` on maps of these heights and widths; resizing is free."""
        *finer, coarsest = grids
        pyramid = zip(self.psp_modules, POOLED, strict=True)
        return total(
            *(map_cost(module, (side, side)) for module, side in pyramid),
            map_cost(self.bottleneck, coarsest),
            *(map_cost(*each) for each in zip(self.lateral_convs, finer, strict=True)),
            *(map_cost(*each) for each in zip(self.fpn_convs, finer, strict=True)),
            map_cost(self.fpn_bottleneck, grids[0]),
            map_cost(self.conv_seg, grids[0]),
        )


class FCNHead(PixelHead):
    """Logits of one map: a convolution of 3 x 3 and the last layer.

    Args:
        in_channels: Channels of the map.
        num_classes: Logits of a pixel.
        channels: Inside.
        drop_rate: As of `UPerHead`.
    """

    def __init__(
        self, in_channels: int, num_classes: int, *, channels: int = 256, drop_rate: float = 0.1
    ) -> None:
        super().__init__(channels, num_classes, drop_rate)
        self.convs = nn.ModuleList([ConvNorm(in_channels, channels, 3)])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (batch, num_classes, height, width), of (batch, in_channels, ...)."""
        for conv in self.convs:
            x = conv(x)
        return self.classify(x)

    def cost(self, grids: Sequence[tuple[int, int]]) -> Cost:
        """Return the cost of `forward` on the last of maps of these heights and widths."""
        return total(map_cost(self.convs, grids[-1]), map_cost(self.conv_seg, grids[-1]))


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Resize maps bilinearly to the sides of others; both are (batch, channels, height, width)."""
    size = like.shape[2:]
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
