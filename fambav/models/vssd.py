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
from fambav.layers.cells import Cells
from fambav.layers.hierarchy import (
    MapConv2d,
    Mixed,
    Mlp,
    ReducibleBlock,
    Stage,
    drop_path_rates,
    trunc_normal_linear,
)
from fambav.layers.nc_ssd import EXPAND, NonCausalSSD
from fambav.layers.tokens import OUTPUT
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

    def forward(self, x: Tensor, cells: Cells | None = None) -> Tensor:
        """Mix a map, (batch, height, width, dim), or kept cells, (batch, kept, dim).

        A cell that stands for n is attended to as n equal ones: log n is added to its logits.
        """
        qkv = self.to_qkv(x.flatten(1, -2)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, length, its width)
        bias = None  # or of shape (batch, 1, 1, length)
        if cells is not None:
            bias = cells.size.log()[:, None, None].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.to_out(y.transpose(1, 2).flatten(2).view(x.shape))
        return out


class VSSDBlock(ReducibleBlock):
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

    def leading(self, x: Tensor, cells: Cells | None = None) -> Tensor:
        """Add the first convolution."""
        out: Tensor = x + (
            self.cpe1(x) if cells is None else cells.convolve(self.cpe1, x, stream=True)
        )
        return out

    def normed(self, x: Tensor) -> Tensor:
        """Normalise what the mixer reads."""
        normed: Tensor = self.norm1(x)
        return normed

    def mixed(
        self, x: Tensor, cells: Cells | None = None, want: frozenset[str] = frozenset()
    ) -> Mixed:
        """Mix a normalised map, or kept cells of it; see `ReducibleBlock`."""
        mixed: Mixed = self.attn(x, cells, want) if want else self.attn(x, cells)
        return mixed

    def trailing(self, x: Tensor, cells: Cells | None = None) -> Tensor:
        """Add the second convolution and the MLP of each cell."""
        x = x + (self.cpe2(x) if cells is None else cells.convolve(self.cpe2, x, stream=True))
        return self.residual(x, self._widen)

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
    reducible = True
    unaligned = "states of vssd are sums without an order"
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

    def known_of(self, stage: int) -> frozenset[str]:
        """Return what mixers of a stage can return; attention has no state."""
        block = cast(VSSDBlock, self.stages[stage][0])
        return OUTPUT if isinstance(block.attn, Attention) else super().known_of(stage)

    def branch_costs(
        self, block: nn.Module, grid: tuple[int, int], kept: int | None = None
    ) -> tuple[Cost, Cost]:
        """Return the cost of a block's mixer, and of its MLP; see `Hierarchical`."""
        known, cells = cast(VSSDBlock, block), math.prod(grid) if kept is None else kept
        mixer = known.attn
        if isinstance(mixer, NonCausalSSD):
            inner, state, _ = mixer.convolved_splits
            mixed = nc_ssd_cost(cells, inner, state, mixer.heads)
        else:
            mixed = Cost.of_products(2 * cells**2 * mixer.to_out.in_features)
        leading, trailing = (
            total(*(map_cost(part, grid, kept) for part in parts))
            for parts in ((known.cpe1, known.norm1, mixer), (known.cpe2, known.norm2, known.mlp))
        )
        return total(leading, mixed), trailing

    def mixer_width(self, stage: int) -> int:
        """Return the width inside the mixers of a stage, from 0."""
        mixer = cast(VSSDBlock, self.stages[stage][0]).attn
        attention = isinstance(mixer, Attention)
        return super().mixer_width(stage) if attention else EXPAND * self.dims[stage]

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
