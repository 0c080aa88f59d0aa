"""VSSD: a hierarchical backbone whose cells share one state, and attend to each other at the end.

    image -> stem -> 4 x (blocks: convolve, add; norm, mix, add; convolve, add; norm, MLP, add)
          -> norm -> mean -> head

The mixer is a non-causal state-space model, and softmax attention in the last stage.

Source: Shi et al., "VSSD", arXiv:2407.18559 version 2, and the weights released with it.  The form
of the later ICCV paper, with normalised states and rotary embeddings, is not here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fambav.arguments import is_whole, whole
from fambav.layers.hierarchy import (
    MapBlock,
    MapConv2d,
    Mlp,
    Stage,
    drop_path_rates,
    trunc_normal_linear,
)
from fambav.layers.nc_ssd import EXPAND, NonCausalSSD
from fambav.models.entry import register
from fambav.models.flops import Cost, map_cost, nc_ssd_cost, total
from fambav.models.hierarchical import Hierarchical

WIDENED = 4  # channels inside stem and downsampling, in units of what they give
MLP_RATIO = 4


class Attention(nn.Module):
    """Softmax attention of every cell of a map to every other, without position embeddings.

    Args:
        dim: Width of a cell.
        heads: Its divisor.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map, (batch, height, width, dim); the shape stays."""
        qkv = self.to_qkv(x.flatten(1, 2)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, length, its width)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out(y.transpose(1, 2).flatten(2).view(x.shape))
        return out


class VSSDBlock(MapBlock):
    """A mixer of the map and an MLP of each cell, with a convolution of each channel before both.

    Args:
        dim: Width of a cell.
        mixer: Of the map.
        drop_path: Probability that a sample skips the mixer or the MLP.
    """

    def __init__(self, dim: int, mixer: NonCausalSSD | Attention, *, drop_path: float) -> None:
        super().__init__(drop_path)
        # Names and order are those of the published weights.
        self.cpe1 = MapConv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = mixer
        self.cpe2 = MapConv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Add all branches to a map, (batch, height, width, dim)."""
        x = self.residual(x + self.cpe1(x), self._mix)
        return self.residual(x + self.cpe2(x), self._widen)

    def _mix(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attn(self.norm1(x))
        return mixed

    def _widen(self, x: Tensor) -> Tensor:
        widened: Tensor = self.mlp(self.norm2(x))
        return widened


class Stem(nn.Module):
    """Five convolutions that map images to cells of 4 x 4 pixels, normalised over the batch.

    Args:
        in_chans: Channels of an image.
        dim: Width of a cell.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half, wide = dim // 2, WIDENED * dim
        self.conv1 = _convolution(in_chans, half, 3, stride=2)
        self.conv2 = nn.Sequential(
            _convolution(half, half, 3), _convolution(half, half, 3, relu=False)
        )
        self.conv3 = nn.Sequential(
            _convolution(half, wide, 3, stride=2), _convolution(wide, dim, 1, relu=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed: (batch, height, width, in_chans) -> (batch, height / 4, width / 4, dim)."""
        x = self.conv1(x.permute(0, 3, 1, 2))
        x = self.conv3(x + self.conv2(x))
        return x.permute(0, 2, 3, 1).contiguous()


class Downsample(nn.Module):
    """Halve the sides of a map by a convolution of each channel between two of each cell.

    Args:
        dim: Width of a cell.
        out: Width of a cell of the result.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        wide = WIDENED * out
        self.conv = nn.Sequential(
            _convolution(dim, wide, 1, bias=True, norm=False),
            _convolution(wide, wide, 3, stride=2, groups=wide, bias=True, norm=False),
            _convolution(wide, out, 1, bias=True, relu=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map: (batch, height, width, dim) -> (batch, height / 2, width / 2, out), rounded up."""
        x = self.conv(x.permute(0, 3, 1, 2))
        return x.permute(0, 2, 3, 1).contiguous()


class VSSD(Hierarchical):
    """Classifier of maps whose cells share a state, with softmax attention in the last stage.

    Names, shapes and order of the parameters are those of the published weights.

    Args:
        dims: Width of a cell in each stage.
        depths: Blocks in each stage.
        heads: Of the mixers of each stage; divisors of 2 * dims, and in the last stage of dims.
        state: Width of the state.
        img_size: Side of an image or (height, width), in pixels; all sizes are taken.
        in_chans: Channels of an image.
        num_classes: Length of the output; 0 returns the feature.
        global_pool: What the head reads: "avg", the mean over cells, or "", every cell by itself.
        drop_rate: Dropout of what the head reads.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        out_norms: Normalise the feature maps of stages, as backbones of dense prediction do.

    Raises:
        ValueError: If a number is not one of those above.
    """

    family = "vssd"
    undecayed = ("A_log", "D", "dt_bias")
    first_conv = "patch_embed.conv1.conv"

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        state: int = 64,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: bool = False,
    ) -> None:
        super().__init__()
        self.set_sizes(dims, depths, img_size, in_chans, global_pool, drop_rate)
        _check_heads(heads, dims)
        whole("state", state, least=1)
        self.patch_embed = Stem(in_chans, dims[0])
        rates, last = drop_path_rates(drop_path_rate, depths), len(dims) - 1

        def block(stage: int, rate: float) -> VSSDBlock:
            dim, own = dims[stage], heads[stage]
            mixer = (
                Attention(dim, own) if stage == last else NonCausalSSD(dim, heads=own, state=state)
            )
            return VSSDBlock(dim, mixer, drop_path=rate)

        between = [*(Downsample(dim, after) for dim, after in pairwise(dims)), None]
        self.layers = nn.ModuleList(
            Stage([block(stage, rate) for rate in rates[stage]], after)
            for stage, after in enumerate(between)
        )
        self.apply(trunc_normal_linear)
        self.norm = nn.LayerNorm(dims[-1])
        self.finish(num_classes, out_norms=out_norms)

    def block_cost(self, block: nn.Module, grid: tuple[int, int]) -> Cost:
        """Return the cost of a block on a map of a height and width."""
        mixer, cells = cast(VSSDBlock, block).attn, math.prod(grid)
        if isinstance(mixer, NonCausalSSD):
            inner, state, _ = mixer.convolved_splits
            mixed = nc_ssd_cost(cells, inner, state, mixer.heads)
        else:
            mixed = Cost.of_products(2 * cells**2 * mixer.to_out.in_features)
        return total(map_cost(block, grid), mixed)

    def head_cost(self, grid: tuple[int, int]) -> Cost:
        """Return the cost of norm and classifier; the authors' counter passes over the mean."""
        classified = Cost.of_products(self.num_features * self.num_classes)
        return total(map_cost(self.norm, grid), classified)

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights, which have their names already.

        Raises:
            ValueError: If they are of the form of 2025.
        """
        if any(".attn.ropes." in name for name in weights):
            raise ValueError(
                "checkpoint is of VSSD's form of 2025, with rotary embeddings, expected that of"
                " 2024 as the model"
            )
        return weights


def _convolution(
    dim: int,
    out: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    norm: bool = True,
    relu: bool = True,
) -> nn.Sequential:
    """A convolution of (batch, dim, height, width), with what follows it."""
    padding = kernel // 2
    conv = nn.Conv2d(dim, out, kernel, stride, padding, groups=groups, bias=bias)
    parts = OrderedDict[str, nn.Module](conv=conv)
    if norm:
        parts["norm"] = nn.BatchNorm2d(out)
    if relu:
        parts["act"] = nn.ReLU()
    return nn.Sequential(parts)


def _check_heads(heads: Sequence[int], dims: Sequence[int]) -> None:
    """Refuse heads that do not divide the width that they share.

    Raises:
        ValueError: If a stage has none, or a number that is not a divisor.
    """
    widths = [*(EXPAND * dim for dim in dims[:-1]), dims[-1]]
    if len(heads) != len(dims) or not all(
        is_whole(own) and own > 0 and width % own == 0
        for own, width in zip(heads, widths, strict=True)
    ):
        raise ValueError(
            f"heads are {list(heads)}, expected a divisor of each of the widths"
            f" {', '.join(map(str, widths))}"
        )


VARIANTS: dict[str, dict[str, Any]] = {
    "vssd_micro": {
        "dims": (48, 96, 192, 384),
        "depths": (2, 2, 8, 4),
        "heads": (2, 4, 8, 16),
        "state": 48,
    },
    "vssd_tiny": {"dims": (64, 128, 256, 512), "depths": (2, 4, 8, 4), "heads": (2, 4, 8, 16)},
    "vssd_small": {"dims": (64, 128, 256, 512), "depths": (3, 4, 21, 5), "heads": (2, 4, 8, 16)},
    "vssd_base": {"dims": (96, 192, 384, 768), "depths": (3, 4, 21, 5), "heads": (3, 6, 12, 24)},
    "vssd_nano": {
        "dims": (32, 64, 96, 160),
        "depths": (2, 2, 2, 1),
        "heads": (2, 4, 6, 5),
        "state": 16,
        "img_size": 32,
    },
}
globals().update(register(VSSD, VARIANTS))
