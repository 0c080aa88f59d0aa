"""VMamba: a hierarchical backbone whose blocks scan maps along rows and columns, both ways.

    image -> stem -> 4 x (blocks: norm, SS2D, add; norm, MLP, add) -> norm -> mean -> head

Source: Liu et al., "VMamba", arXiv:2401.10166.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn

from fambav.layers.cells import Cells
from fambav.layers.hierarchy import (
    MapConv2d,
    Mixed,
    Mlp,
    PatchMerging,
    ReducibleBlock,
    Stage,
    drop_path_rates,
    trunc_normal_linear,
)
from fambav.layers.ss2d import SS2D
from fambav.models.entry import register
from fambav.models.flops import Cost, map_cost, ss2d_cost, total
from fambav.models.hierarchical import FIRST_STRIDE, Hierarchical

FORMS = ("v2", "vanilla")


class VSSBlock(ReducibleBlock):
    """A selective scan of the map and, with `mlp_ratio`, an MLP of each cell.

    Args:
        dim: Width of a cell.
        form, ssm_ratio, state, mlp_ratio: As of `VMamba`.
        drop_path: Probability that a sample skips a branch.
    """

    def __init__(
        self,
        dim: int,
        *,
        form: str,
        ssm_ratio: float,
        state: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__(drop_path)
        vanilla = form == "vanilla"
        # Names and order are those of the published weights.
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(dim, state=state, expand=ssm_ratio, gated=vanilla, conv_bias=vanilla)
        self.mlp: Mlp | None = None
        if mlp_ratio:
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def normed(self, x: Tensor) -> Tensor:
        """Normalise what the scan reads."""
        normed: Tensor = self.norm(x)
        return normed

    def mixed(
        self, x: Tensor, cells: Cells | None = None, want: frozenset[str] = frozenset()
    ) -> Mixed:
        """Scan a normalised map, or kept cells of it; see `ReducibleBlock`."""
        mixed: Mixed = self.op(x, cells, want)
        return mixed

    def trailing(self, x: Tensor, cells: Cells | None = None) -> Tensor:
        """Add the MLP of each cell, if there is one."""
        del cells
        return x if self.mlp is None else self.residual(x, self._widen)

    def _widen(self, x: Tensor) -> Tensor:
        widened: Tensor = self.mlp(self.norm2(x))  # type: ignore[misc]  # only called with one
        return widened


class VMamba(Hierarchical):
    """Classifier of maps mixed by two-dimensional selective scans.

    Names, shapes and order of the parameters are those of the published weights.

    Args:
        dims: Width of a cell in each stage.
        depths: Blocks in each stage.
        form: "v2", of the paper's final models: stem and downsampling of 3 x 3 convolutions, no
            gate, an MLP in each block; or "vanilla", of its first ones: patches of 4 x 4 and of 2 x
            2, a gate, no MLP.
        ssm_ratio: Width inside a scan, in units of the width of a cell.
        state: Numbers of state per channel; 1, or 16 of the vanilla form, by default.
        mlp_ratio: Width inside an MLP, likewise; 4, or 0 of the vanilla form, by default.
        img_size: Side of an image or (height, width), in pixels; all sizes are taken.
        in_chans: Channels of an image.
        num_classes: Length of the output; 0 returns the feature.
        global_pool: What the head reads: "avg", the mean over cells, or "", every cell by itself.
        drop_rate: Dropout of what the head reads.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        out_norms: Normalise the feature maps of stages, as backbones of dense prediction do.

    Raises:
        ValueError: If a name or number is not one of those above.
    """

    family = "vmamba"
    directions = 4
    reducible = True
    unaligned = "scans of vmamba read kept tokens as if none had been between"
    undecayed = ("A_logs", "Ds", "dt_projs_bias")
    classifier_name, final_norm = "classifier.head", "classifier.norm"

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        form: str = "v2",
        ssm_ratio: float = 2.0,
        state: int | None = None,
        mlp_ratio: float | None = None,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: bool = False,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form is {form!r}, expected {' or '.join(map(repr, FORMS))}")
        self.form, vanilla = form, form == "vanilla"
        self.set_sizes(dims, depths, img_size, in_chans, global_pool, drop_rate)
        self.patch_embed = _patches(dims[0], in_chans) if vanilla else _stem(dims[0], in_chans)
        block = partial(
            VSSBlock,
            form=form,
            ssm_ratio=ssm_ratio,
            state=(16 if vanilla else 1) if state is None else state,
            mlp_ratio=(0.0 if vanilla else 4.0) if mlp_ratio is None else mlp_ratio,
        )
        rates = drop_path_rates(drop_path_rate, depths)
        downsample: Callable[[int, int], nn.Module] = PatchMerging if vanilla else _halving
        between = [downsample(dim, after) for dim, after in pairwise(dims)]
        stages = [
            Stage([block(dim, drop_path=rate) for rate in own], after)
            for dim, own, after in zip(dims, rates, (*between, None), strict=True)
        ]
        self.layers = nn.ModuleList(stages)
        self.apply(trunc_normal_linear)
        self.classifier = nn.Sequential(
            OrderedDict[str, nn.Module](norm=nn.LayerNorm(dims[-1]), head=nn.Identity())
        )
        self.finish(num_classes, out_norms=out_norms)

    def branch_costs(
        self, block: nn.Module, grid: tuple[int, int], kept: int | None = None
    ) -> tuple[Cost, Cost]:
        """Return the cost of a block's scan, and of its MLP; see `Hierarchical`."""
        known = cast(VSSBlock, block)
        mixed = total(map_cost(known.norm, grid, kept), ss2d_cost(known.op, grid, kept))
        widened = [] if known.mlp is None else [known.norm2, known.mlp]
        return mixed, total(*(map_cost(part, grid, kept) for part in widened))

    def mixer_width(self, stage: int) -> int:
        """Return the width inside the scans of a stage, from 0."""
        return cast(VSSBlock, self.stages[stage][0]).op.out_proj.in_features

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor on which the sizes of maps depend."""
        return {**super().config, "form": self.form}

    @classmethod
    def grids(
        cls, img_size: tuple[int, int], *, form: str = "v2", **config: Any
    ) -> list[tuple[int, int]]:
        """Return each stage's grid; patches of the vanilla form cut what they do not fill."""
        if form == "vanilla":
            height, width = (side - side % FIRST_STRIDE for side in img_size)
            img_size = height, width
        return super().grids(img_size, **config)

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of the authors' older and single-file codes under the names here.

        Raises:
            ValueError: If they are of the other form.
        """
        merging = any(".downsample.2." in name for name in weights)  # of the single file
        renamed = {}
        for name, value in weights.items():
            for old, new in _RENAMED + _MERGING * merging:
                name = re.sub(old, new, name)
            if value.ndim == 4 and value.shape[2:] == (1, 1):  # a linear map saved as convolution
                value = value.flatten(1)
            if value.ndim == 2 and name.endswith(("x_proj_weight", "dt_projs_weight")):
                value = value.unflatten(0, (self.directions, -1))
            renamed[name] = value
        if any(".op." in name for name in renamed):
            form = FORMS[any(name.endswith("op.conv2d.bias") for name in renamed)]
            if form != self.form:
                raise ValueError(
                    f"checkpoint is of VMamba's form {form!r}, expected {self.form!r} as the model"
                )
        return renamed


def _stem(dim: int, in_chans: int) -> nn.Sequential:
    """Two convolutions that each halve the sides; published weights count permutations too."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            {
                "0": MapConv2d(in_chans, dim // 2, 3, stride=2, padding=1),
                "2": nn.LayerNorm(dim // 2),
                "4": nn.GELU(),
                "5": MapConv2d(dim // 2, dim, 3, stride=2, padding=1),
                "7": nn.LayerNorm(dim),
            }
        )
    )


def _patches(dim: int, in_chans: int) -> nn.Sequential:
    """Patches of 4 x 4."""
    conv = MapConv2d(in_chans, dim, FIRST_STRIDE, stride=FIRST_STRIDE)
    return nn.Sequential(OrderedDict[str, nn.Module]({"0": conv, "2": nn.LayerNorm(dim)}))


def _halving(dim: int, out: int) -> nn.Sequential:
    """A convolution that halves the sides."""
    conv = MapConv2d(dim, out, 3, stride=2, padding=1)
    return nn.Sequential(OrderedDict[str, nn.Module]({"1": conv, "3": nn.LayerNorm(out)}))


_RENAMED = (  # older names, and those of the single file
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\bpatch_embed\.proj\.", "patch_embed.0."),
    (r"\bpatch_embed\.norm\.", "patch_embed.2."),
    (r"^(norm|head)\.", r"classifier.\1."),
    (r"\.op\.(x_proj|dt_projs)\.weight$", r".op.\1_weight"),
)
_MERGING = (
    (r"\.downsample\.1\.", ".downsample.norm."),
    (r"\.downsample\.2\.", ".downsample.reduction."),
)
_TINY, _BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
VARIANTS: dict[str, dict[str, Any]] = {
    # s: width inside a scan in units of the map's; l: blocks of stage 3.
    "vmamba_tiny_s1l8": {"dims": _TINY, "depths": (2, 2, 8, 2), "ssm_ratio": 1.0},
    "vmamba_tiny_s2l5": {"dims": _TINY, "depths": (2, 2, 5, 2)},
    "vmamba_small_s2l15": {"dims": _TINY, "depths": (2, 2, 15, 2)},
    "vmamba_small_s1l20": {"dims": _TINY, "depths": (2, 2, 20, 2), "ssm_ratio": 1.0},
    "vmamba_base_s2l15": {"dims": _BASE, "depths": (2, 2, 15, 2)},
    "vmamba_base_s1l20": {"dims": _BASE, "depths": (2, 2, 20, 2), "ssm_ratio": 1.0},
    "vanilla_vmamba_tiny": {"dims": _TINY, "depths": (2, 2, 9, 2), "form": "vanilla"},
    "vanilla_vmamba_small": {"dims": _TINY, "depths": (2, 2, 27, 2), "form": "vanilla"},
    "vanilla_vmamba_base": {"dims": _BASE, "depths": (2, 2, 27, 2), "form": "vanilla"},
    "vmamba_nano": {
        "dims": (32, 64, 128, 192),
        "depths": (2, 2, 2, 1),
        "ssm_ratio": 1.0,
        "img_size": 32,
    },
}
globals().update(register(VMamba, VARIANTS))
