"""ViM2, MambaMixer for images: scans along paths of a map alternate with scans along its channels.

    image -> patches -> 4 x (token mixer, token mixer, channel mixer, ...) -> norm -> mean -> head

A mixer reads a weighted average of what its stage has so far, with one learned weight for each:

    in[k] = sum over i < k of weight[k, i] out[i]              out[0]: what the stage starts from
    out[k] = in[k] + mix[k](norm(in[k]))

Weights start as 1 for the mixer before and 0 for all others: a chain of residual mixers.

Built from the paper: no code of the authors is public.  docs/vim2.md lists every choice that the
paper leaves open.

Source: Behrouz et al., "MambaMixer: Efficient Selective State Space Models with Dual Token and
Channel Selection", arXiv:2403.19888v1, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from fambav.layers.channel_mixer import STEP, ChannelMixer
from fambav.layers.hierarchy import (
    Blocks,
    MapBlock,
    MapConv2d,
    PatchMerging,
    Stage,
    drop_path_rates,
)
from fambav.layers.ss2d import SS2D
from fambav.models.entry import register
from fambav.models.flops import SCAN, Cost, map_cost, ss2d_cost, total
from fambav.models.hierarchical import FIRST_STRIDE, Hierarchical

MIXERS = ("token", "channel")
AVERAGINGS = ("linear", "softmax", "none")


class MixerBlock(MapBlock):
    """A weighted average of maps, and a residual mixer of it.

    Args:
        dim: Width of a cell.
        op: The mixer.
        earlier: How many maps of its stage there are before it.
        averaging: As of `ViM2`.
        drop_path: Probability that a sample skips the mixer.
    """

    def __init__(
        self, dim: int, op: nn.Module, *, earlier: int, averaging: str, drop_path: float
    ) -> None:
        super().__init__(drop_path)
        self.softmax = averaging == "softmax"
        self.earlier_weight: nn.Parameter | None = None
        if averaging != "none":
            start = torch.zeros(earlier)  # of a softmax, equal shares
            if not self.softmax:
                start[-1] = 1.0  # the map before
            self.earlier_weight = nn.Parameter(start)
        self.norm = nn.LayerNorm(dim)
        self.op = op

    def average(self, maps: Sequence[Tensor]) -> Tensor:
        """Average the maps of the stage so far, each (batch, height, width, dim)."""
        if self.earlier_weight is None:
            return maps[-1]
        weight = self.earlier_weight.softmax(dim=0) if self.softmax else self.earlier_weight
        first, *others = zip(weight.unbind(), maps, strict=True)
        out = first[0] * first[1]
        for each, x in others:
            out = out + each * x
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Add the mixer's output to a map, (batch, height, width, dim)."""
        return self.residual(x, self._mix)

    def _mix(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.op(self.norm(x))
        return mixed


class AveragedBlocks(Blocks):
    """The mixers of a stage; each reads an average of all maps before it, which are kept."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no cell goes
        """Run all mixers on a map, whose shape stays."""
        maps = [x]
        for block in cast(Iterable[MixerBlock], self):
            maps.append(block(block.average(maps)))
        return maps[-1]


class AveragedStage(Stage):
    """Mixers at one resolution, and what leads to the next one."""

    def __init__(self, blocks: Sequence[MixerBlock], downsample: nn.Module | None) -> None:
        super().__init__((), downsample)
        self.blocks = AveragedBlocks(blocks)


class ViM2(Hierarchical):
    """Classifier of maps whose cells and whose channels are mixed by selective scans.

    Args:
        dims: Width of a cell in each stage.
        depths: Mixers in each stage.
        mixers: The kinds of a stage's mixers in turn, "token" or "channel"; with ("token",) and
            without averaging, this is VMamba's first form.
        channel_dims: Width inside the channel mixers of each stage, multiples of 16; twice dims by
            default, and dims in the last stage.
        channel_gated: Whether channel mixers have a gate.
        state: Numbers of state per channel of every scan.
        averaging: "linear", weights that are learned freely, from a chain on; "softmax", positive
            ones of sum 1, from equal shares on; or "none", a chain.
        img_size: Side of an image or (height, width), in pixels; all sizes are taken.
        in_chans: Channels of an image.
        num_classes: Length of the output; 0 returns the feature.
        global_pool: What the head reads: "avg", the mean over cells, or "", every cell by itself.
        drop_rate: Dropout of what the head reads.
        drop_path_rate: Stochastic depth of the last mixer; rises linearly from 0.
        out_norms: Normalise the feature maps of stages, as backbones of dense prediction do.

    Raises:
        ValueError: If a name or number is not one of those above.
    """

    family = "vim2"
    directions = 4
    undecayed = ("A_logs", "Ds", "dt_projs_bias", "earlier_weight")

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        mixers: Sequence[str] = ("token", "token", "channel"),
        channel_dims: Sequence[int] | None = None,
        channel_gated: bool = True,
        state: int = 16,
        averaging: str = "linear",
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
        if channel_dims is None:
            channel_dims = *(2 * dim for dim in dims[:-1]), dims[-1]
        _check(mixers, averaging, channel_dims, stages=len(dims))

        def op(number: int, dim: int, width: int) -> nn.Module:
            if mixers[number % len(mixers)] == "token":
                return SS2D(dim, state=state, expand=2.0, gated=True, conv_bias=True)
            return ChannelMixer(dim, width, state=state, gated=channel_gated)

        patches = MapConv2d(in_chans, dims[0], FIRST_STRIDE, stride=FIRST_STRIDE)
        self.patch_embed = nn.Sequential(patches, nn.LayerNorm(dims[0]))
        rates = drop_path_rates(drop_path_rate, depths)
        between = [PatchMerging(dim, after) for dim, after in pairwise(dims)]
        self.layers = nn.ModuleList()
        for dim, width, own, after in zip(dims, channel_dims, rates, (*between, None), strict=True):
            blocks = [
                MixerBlock(
                    dim, op(n, dim, width), earlier=n + 1, averaging=averaging, drop_path=rate
                )
                for n, rate in enumerate(own)
            ]
            self.layers.append(AveragedStage(blocks, after))
        self.apply(_init)
        self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Identity()
        self.finish(num_classes, out_norms=out_norms)

    @classmethod
    def grids(cls, img_size: tuple[int, int], **config: Any) -> list[tuple[int, int]]:
        """Return each stage's grid; patches cut what they do not fill."""
        height, width = (side - side % FIRST_STRIDE for side in img_size)
        return super().grids((height, width), **config)

    def block_cost(self, block: nn.Module, grid: tuple[int, int]) -> Cost:
        """Return the cost of a mixer on a map of a height and width.

        Its average adds one for each number of each map, but to multiply-adds, which are products
        of matrices and convolutions alone.
        """
        known = cast(MixerBlock, block)
        maps = 0 if known.earlier_weight is None else known.earlier_weight.numel()
        averaged = maps * math.prod(grid) * known.norm.weight.numel()
        if isinstance(known.op, SS2D):
            mixed = ss2d_cost(known.op, grid)
        else:
            mixed = channel_mixer_cost(cast(ChannelMixer, known.op), grid)
        return total(Cost(averaged, averaged), map_cost(known.norm, grid), mixed)


def channel_mixer_cost(mixer: ChannelMixer, grid: tuple[int, int]) -> Cost:
    """Return the cost of a channel mixer: projections, convolution, and the scans both ways.

    Both scans are counted as those of SS2D, with 9 * length * inner * state and length * inner.

    Args:
        mixer: Weights may be on the meta device.
        grid: Height and width of the map.
    """
    steps = math.prod(grid) * mixer.out_proj.in_features // STEP  # of all cells, one way
    own = (mixer.conv_weight, mixer.x_proj_weight, mixer.dt_projs_weight)
    products = steps * sum(weight.numel() for weight in own)
    scanned = steps * mixer.Ds.numel() * (SCAN * mixer.splits[1] + 1)
    return total(map_cost(mixer, grid), Cost.of_products(products), Cost(scanned, scanned))


def _check(
    mixers: Sequence[str], averaging: str, channel_dims: Sequence[int], *, stages: int
) -> None:
    """Refuse names that are unknown and widths that no channel mixer has.

    Raises:
        ValueError: If there is one.
    """
    if isinstance(mixers, str) or not mixers or not {*mixers} <= {*MIXERS}:
        known = " and ".join(map(repr, MIXERS))
        raise ValueError(f"mixers is {mixers!r}, expected a sequence of {known}")
    if averaging not in AVERAGINGS:
        known = " or ".join(map(repr, AVERAGINGS))
        raise ValueError(f"averaging is {averaging!r}, expected {known}")
    if len(channel_dims) != stages or any(width < 1 or width % STEP for width in channel_dims):
        raise ValueError(
            f"channel_dims are {list(channel_dims)}, expected a multiple of {STEP} for each of"
            f" {stages} stages"
        )


def _init(module: nn.Module) -> None:
    """Draw a linear map as VMamba does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)


_TINY, _BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
VARIANTS: dict[str, dict[str, Any]] = {
    "vim2_tiny": {"dims": _TINY, "depths": (3, 3, 9, 3)},
    "vim2_small": {"dims": _TINY, "depths": (3, 3, 27, 3)},
    "vim2_base": {"dims": _BASE, "depths": (3, 3, 27, 3)},
    "vim2_nano": {"dims": (24, 48, 96, 192), "depths": (3, 3, 3, 3), "img_size": 32},
}
globals().update(register(ViM2, VARIANTS))
