"""GroupMamba: a hierarchical backbone whose blocks scan each quarter of the channels in one way.

    image -> 4 x (convolutions that halve the sides, blocks: add mixer; norm, MLP, add; norm)
          -> mean -> class block -> norm -> head, and a second head that learns from a teacher

Source: Shaker et al., "GroupMamba: Efficient Group-Based Visual State Space Model",
arXiv:2407.13772, as its code computes it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fambav.layers.group_mamba import GroupMambaMixer
from fambav.layers.hierarchy import Blocks, MapBlock, MapConv2d, Mlp, drop_path_rates
from fambav.models.entry import register
from fambav.models.flops import Cost, group_mamba_cost, map_cost, total
from fambav.models.hierarchical import Hierarchical

FINE = 1e-6  # epsilon of the norms outside of mixers and of what halves the sides


class Stem(nn.Module):
    """Halve the sides of images by a convolution of 7 x 7, followed by two of 3 x 3, and again.

    Args:
        in_chans: Channels of an image.
        hidden: Channels in between.
        dim: Width of a cell.
    """

    def __init__(self, in_chans: int, hidden: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, kernel, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            padding = kernel // 2
            conv = nn.Conv2d(channels, hidden, kernel, stride, padding, bias=False)
            layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU()]
        # Names and order are those of the published weights.
        self.conv = nn.Sequential(*layers)
        self.proj = MapConv2d(hidden, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embed: (batch, height, width, in_chans) -> (batch, height / 4, width / 4, dim)."""
        x = self.conv(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = self.norm(self.proj(x))
        return out


class Mlp2d(nn.Module):
    """An MLP of cells that sees their neighbours by a convolution of each channel in between.

    Args:
        dim: Width of a cell.
        hidden: Width in between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        conv = MapConv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dwconv = nn.Sequential(OrderedDict[str, nn.Module](dwconv=conv))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map a map, (batch, height, width, dim); the shape stays."""
        out: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(x))))
        return out


class GroupMambaBlock(MapBlock):
    """A mixer, which normalises for itself, and an MLP.

    Args:
        dim: Width of a cell.
        mlp_ratio: Width inside the MLP, in units of dim.
        drop_path: Probability that a sample skips a branch.
    """

    def __init__(self, dim: int, mlp_ratio: float, *, drop_path: float) -> None:
        super().__init__(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=FINE)
        self.attn = GroupMambaMixer(dim)
        self.mlp = Mlp2d(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches to a map, (batch, height, width, dim)."""
        return self.residual(self.residual(x, self.attn), self._widen)

    def _widen(self, x: Tensor) -> Tensor:
        widened: Tensor = self.mlp(self.norm2(x))
        return widened


class ClassBlock(nn.Module):
    """A mixer and an MLP of the one cell that the head reads.

    Args:
        dim: Width of a cell.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=FINE)
        self.norm2 = nn.LayerNorm(dim, eps=FINE)
        self.attn = GroupMambaMixer(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Add both to a map of one cell, (batch, 1, 1, dim)."""
        x = x + self.norm1(self.attn(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GroupMamba(Hierarchical):
    """Classifier of maps mixed by selective scans of groups of channels.

    Names, shapes and order of the parameters are those of the published weights.

    Args:
        dims: Width of a cell in each stage, multiples of 4.
        depths: Blocks in each stage.
        ratios: Width inside the MLPs of each stage, in units of the width of a cell.
        stem: Channels inside the stem.
        distillation: Have a second head, which learns from a teacher, see
            `set_distilled_training`; otherwise the output is the mean of both heads.
        img_size: Side of an image or (height, width), in pixels; all sizes are taken.
        in_chans: Channels of an image.
        num_classes: Length of the output; 0 returns the feature.
        global_pool: What the head reads: "avg", the mean over cells behind the class block, or "",
            every cell by itself, without the class block.
        drop_rate: Dropout of what the head reads.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.

    Attributes:
        distilled_training: Whether a forward pass in training returns the outputs of both heads.

    Raises:
        ValueError: If a name or number is not one of those above.
    """

    family = "groupmamba"
    undecayed = ("A_logs", "Ds", "dt_projs_bias", "skip_scale")
    first_conv, final_norm = "patch_embed1.conv.0", "norm4"
    head: nn.Module
    dist_head: nn.Module

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        ratios: Sequence[float] = (8, 8, 4, 4),
        stem: int = 64,
        distillation: bool = True,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(dims) != 4 or len(ratios) != 4:
            raise ValueError(f"dims are {list(dims)} and ratios {list(ratios)}, expected 4 of each")
        self.set_sizes(dims, depths, img_size, in_chans, global_pool, drop_rate)
        self.distillation, self.distilled_training = distillation, False
        rates = drop_path_rates(drop_path_rate, depths)
        for n, (dim, ratio) in enumerate(zip(dims, ratios, strict=True)):
            entry = _halving(dims[n - 1], dim) if n else Stem(in_chans, stem, dim)
            self.add_module(f"patch_embed{n + 1}", entry)
            block = partial(GroupMambaBlock, dim, ratio)
            self.add_module(f"block{n + 1}", Blocks([block(drop_path=rate) for rate in rates[n]]))
            self.add_module(f"norm{n + 1}", nn.LayerNorm(dim, eps=FINE))
        self.post_network = nn.Sequential(ClassBlock(dims[-1]))
        self.apply(_init)
        self.reset_classifier(num_classes)
        self.describe()

    @property
    def stem(self) -> nn.Module:
        """What maps images, (batch, height, width, in_chans), to the first map."""
        return self._part("patch_embed", 0)

    @property
    def stages(self) -> list[Blocks]:
        """The blocks of each stage."""
        return [cast(Blocks, self._part("block", stage)) for stage in range(len(self.dims))]

    def _part(self, kind: str, stage: int) -> nn.Module:
        """Return a module of a stage, from 0; published weights count from 1."""
        return self.get_submodule(f"{kind}{stage + 1}")

    def next_map(self, stage: int, x: Tensor) -> Tensor:
        """Return the map that the next stage starts from; see `Hierarchical`."""
        out: Tensor = self._part("patch_embed", stage + 1)(self._part("norm", stage)(x))
        return out

    def last_map(self, x: Tensor) -> Tensor:
        """Return the last stage's map as it is; the norm follows the class block."""
        return x

    def feature_norm(self, stage: int, *, norm: bool) -> nn.Module | None:
        """Return what normalises a feature map: in all stages but the last what the model does."""
        last = f"norm{stage + 1}" == self.final_norm
        return None if last and not norm else self._part("norm", stage)

    def forward_head(
        self,
        x: Tensor,
        pre_logits: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> Any:
        """Pool maps of `forward_features` and classify them.

        Args:
            x: (batch, height, width, num_features).
            pre_logits: Return what the heads read, (batch, num_features).

        Returns:
            Logits, (batch, num_classes); in `distilled_training`, those of both heads.
        """
        if self.global_pool == "avg":
            x = self.post_network(x.mean(dim=(1, 2), keepdim=True)).flatten(1)
        x = self.head_drop(self.get_submodule(self.final_norm)(x))
        if pre_logits:
            return x
        if not self.distillation:
            return self.head(x)
        both = self.head(x), self.dist_head(x)
        return both if self.training and self.distilled_training else (both[0] + both[1]) / 2

    def set_distilled_training(
        self,
        enable: bool = True,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> None:
        """Return the outputs of both heads in training, or their mean.

        Raises:
            ValueError: If there is no second head.
        """
        if enable and not self.distillation:
            raise ValueError("distillation is False, expected True: the model has one head")
        self.distilled_training = enable

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the heads."""
        return ("head", "dist_head") if self.distillation else ("head",)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the heads by new ones; see `TimmModel`."""
        super().reset_classifier(num_classes, global_pool)
        if self.distillation:
            self.dist_head = self._new_head(num_classes, next(self.parameters()))

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
        prune_head: bool = True,  # noqa: FBT001, FBT002
    ) -> list[int]:
        """Take away what is not needed for some intermediates; see `Hierarchical`.

        The class block goes with the head, or with the last stage.
        """
        before = len(self.dims)
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.dims) < before:
            self.post_network = nn.Sequential()
        return wanted

    def cut_stages(self, left: int) -> None:
        """Remove all stages but the first `left`, and what leads to the next one."""
        for stage in range(left, len(self.dims)):
            for kind in ("patch_embed", "block", "norm"):
                if f"{kind}{stage + 1}" != self.final_norm:
                    delattr(self, f"{kind}{stage + 1}")

    def group_matcher(
        self,
        coarse: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> dict[str, Any]:
        """Return patterns of the names of parameters in the order of depth; see `Hierarchical`."""
        leading = [
            (rf"^(?:norm{n - 1}|patch_embed{n})\.", (n,) if coarse else (n, 0))
            for n in range(2, len(self.dims) + 1)
        ]
        block = r"^block(\d+)" if coarse else r"^block(\d+)\.(\d+)"
        last = (r"^(?:norm4|post_network)", (99999,))
        return {"stem": r"^patch_embed1", "blocks": [*leading, (block, None), last]}

    def block_cost(self, block: nn.Module, grid: tuple[int, int]) -> Cost:
        """Return the cost of a block on a map of a height and width."""
        known = cast(GroupMambaBlock, block)
        parts = (map_cost(part, grid) for part in (known.norm2, known.mlp))
        return total(group_mamba_cost(known.attn, grid), *parts)

    def leading_cost(self, stage: int, grid: tuple[int, int]) -> Cost:
        """Return the cost of what leads from a stage, from 0, to the next one."""
        norm, halving = self._part("norm", stage), self._part("patch_embed", stage + 1)
        return total(map_cost(norm, grid), map_cost(halving, grid))

    def head_cost(self, grid: tuple[int, int]) -> Cost:
        """Return the cost of what follows the last stage; papers do not count the mean."""
        one, mean = (1, 1), math.prod(grid) * self.num_features
        block = cast(ClassBlock, self.post_network[0])
        parts = (block.norm1, block.norm2, block.mlp, self.get_submodule(self.final_norm))
        return total(
            Cost(0, mean),
            group_mamba_cost(block.attn, one),
            *(map_cost(part, one) for part in parts),
            *(map_cost(self.get_submodule(name), one) for name in self.classifier_names),
        )


def _halving(dim: int, out: int) -> nn.Sequential:
    """A convolution that halves the sides."""
    conv = MapConv2d(dim, out, 3, stride=2, padding=1)
    return nn.Sequential(OrderedDict[str, nn.Module](proj=conv, norm=nn.LayerNorm(out)))


def _init(module: nn.Module) -> None:
    """Draw the weights of a linear map or a convolution as the published training does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        outputs = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outputs))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


_TINY, _SMALL = (64, 128, 348, 448), (64, 128, 348, 512)
VARIANTS: dict[str, dict[str, Any]] = {
    "groupmamba_tiny": {"dims": _TINY, "depths": (3, 4, 9, 3), "stem": 32},
    "groupmamba_small": {"dims": _SMALL, "depths": (3, 4, 16, 3)},
    "groupmamba_base": {"dims": (96, 192, 424, 512), "depths": (3, 6, 21, 3)},
    "groupmamba_nano": {
        "dims": (32, 64, 96, 128),
        "depths": (1, 2, 3, 1),
        "ratios": (4, 4, 4, 4),
        "stem": 16,
        "img_size": 32,
    },
}
globals().update(register(GroupMamba, VARIANTS))
