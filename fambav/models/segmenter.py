"""Networks of the shape of a U: stages down to a coarse map, stages up to logits of each pixel.

    image -> patch_embed -> stage -> merge -> stage -> ... -> stage      the encoder
                    |                  |                        |
    logits <- final_up <- fuse <- stage <- expand <- fuse <- stage      the decoder

What is fused at a level is the map that the encoder's stage read and the map that the decoder's
gave.  A side that a merge does not divide is filled up, and what an expansion gives too much is cut
off, so that images may have any size.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fambav.arguments import whole
from fambav.layers.hierarchy import (
    Blocks,
    MapConv2d,
    PatchMerging,
    Stage,
    drop_path_rates,
    trunc_normal_linear,
)
from fambav.layers.info import BackboneInfo
from fambav.layers.info import Stage as StageInfo
from fambav.models.flops import FREE, Cost, HierarchicalCost, map_cost, total
from fambav.models.hierarchical import FIRST_STRIDE, Hierarchical
from fambav.models.weights import official

PUBLISHED_NORM = 4  # operations for each number that is normalised, as thop counts
SIZES: dict[str, Any] = {  # that papers have trained, but for the widths
    "depths": (2, 2, 2, 2),
    "depths_up": (2, 2, 2, 1),
    "img_size": 256,
    "num_classes": 6,
}


class PatchExpand(nn.Module):
    """Multiply the sides of a map: each cell becomes the cells of a square.

    Args:
        dim: Width of a cell.
        out: Width of a cell of the result.
        factor: From the old sides to the new ones.

    Source: Cao et al., "Swin-Unet", arXiv:2105.05537, section 3.5.
    """

    def __init__(self, dim: int, out: int, factor: int = 2) -> None:
        super().__init__()
        # Names and order are those of published weights.
        self.factor = factor
        self.expand = nn.Linear(dim, factor**2 * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """Expand: (batch, height, width, dim) -> (batch, factor height, factor width, out)."""
        sides = {"down": self.factor, "right": self.factor}
        x = rearrange(self.expand(x), "b h w (down right c) -> b (h down) (w right) c", **sides)
        out: Tensor = self.norm(x)
        return out


class UpStage(nn.Module):
    """What leads to a finer map, and blocks at its resolution.

    Args:
        blocks: As of `Stage`.
        upsample: From the map of the stage before; None in the first stage.
    """

    def __init__(self, blocks: Blocks, upsample: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = blocks
        self.upsample = nn.Identity() if upsample is None else upsample

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """Upsample, cut to the sides of a map, and run the blocks.

        Args:
            x: (batch, height, width, dim) of the stage before.
            like: A map of the resolution of this stage.
        """
        x = self.upsample(x)[:, : like.shape[1], : like.shape[2]]
        out: Tensor = self.blocks(x)
        return out


class Segmenter(Hierarchical):
    """Maps images of any size to logits of each pixel, (batch, num_classes, height, width).

    `features_only` and `forward_intermediates` give the maps of the encoder.

    Args:
        dims: Width of a cell in each stage of the encoder; the decoder's mirror it.
        depths: Blocks in each stage of the encoder.
        depths_up: Blocks in each stage of the decoder, from the coarsest map to the finest.
        img_size: Side of an image or (height, width), in pixels; all sizes are taken.
        in_chans: Channels of an image.
        num_classes: Logits of a pixel; 0 returns what they are made of.
        global_pool: "" or None: nothing is pooled.
        drop_path_rate: Stochastic depth at the coarsest map; rises linearly from 0 down the encoder
            and falls up the decoder.

    Attributes:
        body: Name of the module that has all others in published weights; "" for none.
        decoder: Names of the modules behind the encoder, but for the head, inside the body.

    Raises:
        ValueError: If a number is not one of those above.
    """

    directions = 4
    undecayed = ("A_logs", "Ds")
    classifier_name, first_conv, final_norm = "final_conv", "patch_embed.proj", "norm"
    body: ClassVar[str] = ""
    decoder: ClassVar[tuple[str, ...]] = ("layers_up", "final_up")

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        depths_up: Sequence[int],
        img_size: int | Sequence[int] = 256,
        in_chans: int = 3,
        num_classes: int = 6,
        global_pool: str | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.set_sizes(dims, depths, img_size, in_chans, global_pool, 0.0)
        self.depths_up = tuple(whole("a number of depths_up", n, least=1) for n in depths_up)
        if len(self.depths_up) != len(dims):
            raise ValueError(
                f"depths_up are {list(depths_up)}, expected a number for each of dims {list(dims)}"
            )
        if dims[0] % FIRST_STRIDE:
            raise ValueError(f"dims are {list(dims)}, expected a multiple of {FIRST_STRIDE} first")
        self.num_features = self.head_hidden_size = dims[0] // FIRST_STRIDE
        if self.body:
            self.add_module(self.body, nn.Module())
        self._make(drop_path_rate)
        self.norm = nn.Identity()  # the maps of the encoder are fused as they are
        self.reset_classifier(num_classes)
        self.apply(trunc_normal_linear)
        self.describe()

    def _make(self, drop_path_rate: float) -> None:
        """Make the modules, in the order of published weights."""
        parts: Any = self.get_submodule(self.body)
        conv = MapConv2d(self.in_chans, self.dims[0], FIRST_STRIDE, stride=FIRST_STRIDE)
        parts.patch_embed = nn.Sequential()
        parts.patch_embed.add_module("proj", conv)
        parts.patch_embed.add_module("norm", nn.LayerNorm(self.dims[0]))
        merges = [PatchMerging(dim, out) for dim, out in pairwise(self.dims)]
        rates = drop_path_rates(drop_path_rate, self.depths)
        parts.layers = nn.ModuleList(
            Stage(self.make_blocks(dim, own), merge)
            for dim, own, merge in zip(self.dims, rates, [*merges, None], strict=True)
        )
        up = self.dims[::-1]
        rates = [own[::-1] for own in drop_path_rates(drop_path_rate, self.depths_up[::-1])[::-1]]
        expands = [PatchExpand(dim, out) for dim, out in pairwise(up)]
        parts.layers_up = nn.ModuleList(
            UpStage(self.make_blocks(dim, own), expand)
            for dim, own, expand in zip(up, rates, [None, *expands], strict=True)
        )
        parts.final_up = PatchExpand(self.dims[0], self.num_features, FIRST_STRIDE)

    @abstractmethod
    def make_blocks(self, dim: int, rates: Sequence[float]) -> Blocks:
        """Return the blocks of a stage.

        Args:
            dim: Width of a cell.
            rates: Stochastic depth of each block.
        """

    @abstractmethod
    def fuse(self, level: int, skip: Tensor, x: Tensor) -> Tensor:
        """Return the map that the decoder goes on with, shaped as both are.

        Args:
            level: Number of the encoder's stage, from 0 at the finest map.
            skip: What that stage read.
            x: What the decoder's stage at that resolution gave.
        """

    @property
    def _inside(self) -> str:
        return f"{self.body}." if self.body else ""

    @property
    def ups(self) -> list[UpStage]:
        """The stages of the decoder; none when the encoder is all there is."""
        return list(getattr(self.get_submodule(self.body), "layers_up", ()))

    @property
    def final_map(self) -> PatchExpand:
        """What leads from the last map of the decoder to pixels."""
        return cast(PatchExpand, self.get_submodule(f"{self._inside}final_up"))

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order of depth."""
        return [*super().blocks, *(block for up in self.ups for block in up.blocks)]

    @property
    def info(self) -> BackboneInfo:
        """The stages of the encoder and of the decoder."""
        down = super().info
        coarse_first = zip(self.depths_up, down.stages[::-1], strict=True) if self.ups else ()
        up = tuple(StageInfo(depth, *stage[1:]) for depth, stage in coarse_first)
        return down._replace(stages=down.stages + up)

    @classmethod
    def pool_size(cls, img_size: tuple[int, int], **config: Any) -> tuple[int, int]:
        """Return the height and width of the decoder's last map; see `TimmModel`."""
        return cls.grids(img_size, **config)[0]

    def _pooling(self, name: str | None) -> str:
        if name:
            raise ValueError(
                f"global_pool is {name!r}, expected '' of this model, which labels pixels"
            )
        return ""

    def _new_head(self, num_classes: int, like: Tensor) -> nn.Module:
        whole("num_classes", num_classes, least=0)
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Conv2d(self.num_features, num_classes, 1)
        return head.to(like).train(self.training)

    def embed(self, images: Tensor) -> Tensor:
        """Return the first map of images; the last patches of a row or column are filled up.

        Raises:
            ValueError: As `Hierarchical.embed`.
        """
        if images.ndim == 4:
            height, width = images.shape[2:]
            self.check_size((height, width))
            images = F.pad(images, (0, -width % FIRST_STRIDE, 0, -height % FIRST_STRIDE))
        return super().embed(images)

    def forward(self, images: Tensor) -> Tensor:
        """Label pixels: (batch, in_chans, height, width) -> (batch, num_classes, height, width)."""
        height, width = images.shape[2:]
        return self.forward_head(self.forward_features(images))[..., :height, :width]

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map of the decoder, (batch, height / 4, width / 4, dims[0]), rounded up.

        Args:
            images: (batch, in_chans, height, width), of any size but too small ones.

        Raises:
            ValueError: As `embed`.
        """
        x, skips = self.embed(images), list[Tensor]()
        for stage, blocks in enumerate(self.stages):
            skips.append(self.next_map(stage - 1, x) if stage else x)
            x = blocks(skips[-1])
        for up in self.ups:
            skip = skips.pop()
            x = self.fuse(len(skips), skip, up(x, skip))
        return x

    def forward_head(
        self,
        x: Tensor,
        pre_logits: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> Tensor:
        """Label pixels of what `forward_features` returns.

        Args:
            x: (batch, height, width, dims[0]).
            pre_logits: Return what the head reads, (batch, dims[0] / 4, 4 height, 4 width).
        """
        x = self.final_map(x).permute(0, 3, 1, 2)
        logits: Tensor = x if pre_logits else self.get_classifier()(x)
        return logits

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
        prune_head: bool = True,  # noqa: FBT001, FBT002
    ) -> list[int]:
        """Take away the decoder, and what is not needed for some maps of the encoder.

        Args:
            indices: As for `forward_intermediates`; stages behind the last one go.
            prune_norm: Not used: all that is behind the encoder goes.
            prune_head: Not used, likewise.

        Returns:
            The stages that are meant, from 0.
        """
        del prune_norm, prune_head
        wanted = super().prune_intermediate_layers(indices)
        for name in self.decoder:
            owner, _, last = f"{self._inside}{name}".rpartition(".")
            delattr(self.get_submodule(owner), last)
        return wanted

    def set_grad_checkpointing(
        self,
        enable: bool = True,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> None:
        """Keep only maps between branches for the backward pass and compute the rest again."""
        super().set_grad_checkpointing(enable)
        for up in self.ups:
            up.blocks.set_grad_checkpointing(enable)

    def group_matcher(
        self,
        coarse: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> dict[str, Any]:
        """Return patterns of the names of parameters in the order of depth.

        Names without one, of the head and of what fuses maps, are the last group.

        Args:
            coarse: A stage is a group, not a block.  What leads to a stage belongs to its start.
        """
        inside, block = re.escape(self._inside), "" if coarse else r"\.blocks\.(\d+)"
        start = () if coarse else (0,)
        down = [
            (rf"^{inside}layers\.{stage}\.downsample", (stage + 1, *start))
            for stage in range(len(self.dims) - 1)
        ]
        up = [
            (rf"^{inside}layers_up\.{stage}\.upsample", (stage, *start))
            for stage in range(len(self.depths_up))
        ]
        return {
            "stem": rf"^{inside}patch_embed",
            "blocks": [*down, (rf"^{inside}layers\.(\d+){block}", None)],
            "decoder": [*up, (rf"^{inside}layers_up\.(\d+){block}", None)],
        }

    def flop_parts(self) -> HierarchicalCost:
        """Return what an image costs each part; weights may be on the meta device.

        Literature is what thop counts, as these papers do: linear maps, convolutions, 4 for each
        number that is normalised, and for an average 1 for each number that goes in and for what
        comes out; no scan, nor products with other weights.
        """
        grids = [stage.grid for stage in self.info.stages]
        stages = [*self.stages, *(up.blocks for up in self.ups)]
        whole_cells = (FIRST_STRIDE * grids[0][0], FIRST_STRIDE * grids[0][1])
        last, up = len(self.dims) - 1, grids[len(self.dims) :]
        fused = [self.fuse_cost(last - n, grid) for n, grid in enumerate(up)]
        expands = [cast(PatchExpand, stage.upsample) for stage in self.ups[1:]]
        merged = [self.leading_cost(n, grid) for n, grid in enumerate(grids[:last])]
        expanded = [
            total(cost, _expansion_cost(expand, *both))
            for cost, expand, both in zip(fused, expands, pairwise(up), strict=False)
        ]
        embedded = map_cost(self.patch_embed, whole_cells)
        head = self.get_classifier()
        return HierarchicalCost(
            patches=as_published(embedded, (self.patch_embed, grids[0])),
            leading=(FREE, *merged, FREE, *expanded),
            blocks=tuple(
                tuple(self.block_cost(block, grid) for block in blocks)
                for blocks, grid in zip(stages, grids, strict=True)
            ),
            head=total(
                fused[-1],
                _expansion_cost(self.final_map, grids[-1], whole_cells),
                as_published(map_cost(head, whole_cells), (head, whole_cells)),
            ),
        )

    def leading_cost(self, stage: int, grid: tuple[int, int]) -> Cost:
        """Return the cost of merging the patches of a stage, from 0, whose map is `grid`."""
        merge = cast(Stage, self.layers[stage]).downsample
        return as_published(map_cost(merge, grid), (merge, self.info.stages[stage + 1].grid))

    def fuse_cost(self, level: int, grid: tuple[int, int]) -> Cost:
        """Return the cost of `fuse` on maps of a height and width; sums count nowhere."""
        del level, grid
        return FREE

    def pick(
        self,
        payload: Mapping[str, Any],
        *,
        ema: bool = False,
        head: Literal["strict", "drop"] = "strict",
    ) -> dict[str, Tensor]:
        """Pick the weights out of a file of this model, or start from those of vanilla VMamba.

        Of VMamba, each stage of the encoder and of the decoder takes those of the stage of its
        width, as far as names and shapes agree, as Ruan et al. do; the rest stays as it is.

        Args:
            payload: As for `official`.
            ema: Take the moving average.
            head: As for `official`; "drop" takes VMamba's.

        Raises:
            ValueError: As `official`, or if the weights of VMamba have another form or width.
        """
        weights = official(payload, ema=ema)
        if any("layers_up." in name for name in weights):
            return super().pick(payload, ema=ema, head=head)
        own, last = self.state_dict(), len(self.dims) - 1
        taken: dict[str, Tensor] = {}
        for name, value in weights.items():
            for old, new in _VMAMBA:
                name = re.sub(old, new, name)
            mirrored = re.sub(
                r"^layers\.(\d+)\.blocks",
                lambda stage: f"layers_up.{last - int(stage[1])}.blocks",
                name,
            )
            for each in (f"{self._inside}{name}", f"{self._inside}{mirrored}"):
                if each in own and own[each].shape == value.shape:
                    taken[each] = value
        encoder = rf"^{re.escape(self._inside)}(patch_embed|layers)\..*({_SHARED})"
        lacking = sorted(name for name in own if re.search(encoder, name) and name not in taken)
        if lacking or head != "drop":
            lack = f", and lacks {len(lacking)} weights such as {lacking[0]}" if lacking else ""
            raise ValueError(
                f"checkpoint has no decoder{lack}, expected one of this model; --finetune takes"
                " the encoder of a vanilla VMamba of its widths"
            )
        return own | taken


def as_published(cost: Cost, *counted: tuple[nn.Module, tuple[int, int]]) -> Cost:
    """Return a cost whose literature is what thop counts.

    Args:
        cost: In the other conventions.
        counted: Modules with the height and width of the map that they give.
    """
    operations = 0
    for module, grid in counted:
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                operations += math.prod(grid) * part.weight.numel()
            elif isinstance(part, nn.LayerNorm | nn.BatchNorm2d):
                operations += PUBLISHED_NORM * math.prod(grid) * part.weight.numel()
    return cost._replace(literature=operations)


def _expansion_cost(expand: PatchExpand, grid: tuple[int, int], finer: tuple[int, int]) -> Cost:
    counted = (expand.expand, grid), (expand.norm, finer)
    return as_published(total(*(map_cost(*each) for each in counted)), *counted)


_SHARED = r"patch_embed|downsample|ln_1|self_attention"  # what VMamba has too
_VMAMBA = (  # names in its older and newer code, and here
    (r"^.*?\b(patch_embed|layers)\.", r"\1."),
    (r"\bpatch_embed\.0\.", "patch_embed.proj."),
    (r"\bpatch_embed\.2\.", "patch_embed.norm."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.ln_1."),
    (r"\.op\.", ".self_attention."),
)
