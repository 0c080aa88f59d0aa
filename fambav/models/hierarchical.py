"""A backbone of stages, each at half the resolution of the one before.

images -> patch_embed -> stage -> downsample -> stage -> ... -> norm -> mean over cells -> head

A subclass makes `patch_embed`, `layers`, and the modules named `final_norm` and `classifier_name`;
or, where published weights have other names, overrides `embed`, `stages` and `next_map`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from fambav.arguments import MOST_LAYERS, probability, refusal, whole
from fambav.layers.block import Hooks
from fambav.layers.drop import Dropout
from fambav.layers.embed import check_images, pair
from fambav.layers.hierarchy import Blocks, Stage
from fambav.layers.info import BackboneInfo
from fambav.layers.info import Stage as StageInfo
from fambav.layers.tokens import OUTPUT, STATE
from fambav.models.entry import chosen_layers, data_config
from fambav.models.flops import FREE, Cost, HierarchicalCost, map_cost, total
from fambav.models.timm_model import TimmModel, pool_patches
from fambav.reduction import StagedReduction, make_staged_reduction

FIRST_STRIDE = 4  # pixels from one cell of the first map to the next


class Hierarchical(TimmModel):
    """A classifier of maps, (batch, height, width, dim), for images of any size.

    Attributes:
        dims: Width of a cell in each stage.
        depths: Blocks in each stage.
        family: A key of `fambav.registry.FAMILIES`.
        directions: In how many directions a mixer scans.
        patch_embed: Maps images, (batch, height, width, in_chans), to the first map.
        layers: The stages.
        reducible: Whether its mixers also take kept cells alone; all blocks are `ReducibleBlock`
            then, and `reduction` removes cells within stages and may be replaced at any time.
        unaligned: Why its mixers cannot age a state over cells that went.
        output_fmt: Layout of what `forward_features` returns, for timm.
    """

    first_conv = "patch_embed.0"
    feature_count = 4
    family: ClassVar[str]
    directions: ClassVar[int] = 1
    reducible: ClassVar[bool] = False
    unaligned: ClassVar[str] = "none of its mixers knows that cells went"
    output_fmt = "NHWC"
    dynamic_img_size = True
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    patch_embed: nn.Module
    layers: nn.ModuleList
    reduction: StagedReduction

    def set_sizes(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        img_size: int | Sequence[int],
        in_chans: int,
        global_pool: str | None,
        drop_rate: float,
    ) -> None:
        """Set what constructors of all models are given.

        Raises:
            ValueError: If there are not as many dims as depths, a number is below 1, or images are
                too small.
        """
        if not dims or len(dims) != len(depths):
            raise ValueError(
                f"dims are {list(dims)} and depths {list(depths)}, expected one of each for every"
                " stage"
            )
        self.dims = tuple(whole("dims", dim, least=1) for dim in dims)
        self.depths = tuple(whole("depths", n, least=1, most=MOST_LAYERS) for n in depths)
        self.in_chans = whole("in_chans", in_chans, least=1)
        self.num_features = self.head_hidden_size = self.dims[-1]
        self.img_size = pair(img_size, name="img_size")
        self.check_size(self.img_size)
        self.global_pool = self._pooling(global_pool)
        self.head_drop = Dropout(probability("drop_rate", drop_rate))

    @classmethod
    def pool_size(cls, img_size: tuple[int, int], **config: Any) -> tuple[int, int]:
        """Return the height and width of the last map; see `TimmModel`."""
        return cls.grids(img_size, **config)[-1]

    @classmethod
    def grids(
        cls, img_size: tuple[int, int], *, dims: Sequence[int], **config: Any
    ) -> list[tuple[int, int]]:
        """Return the height and width of each stage's map; a part of a cell makes one.

        Args:
            img_size: Height and width of an image, in pixels.
            dims: An entry for each stage.
            config: Other arguments of the constructor.
        """
        del config
        height, width = img_size
        strides = [FIRST_STRIDE * 2**stage for stage in range(len(dims))]
        return [(-(-height // stride), -(-width // stride)) for stride in strides]

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor on which the sizes of maps depend."""
        return {"dims": self.dims}

    @property
    def info(self) -> BackboneInfo:
        """The model in figures."""
        return self.info_on(self.img_size)

    def info_on(self, size: tuple[int, int]) -> BackboneInfo:
        """Return the model in figures on images of a height and width."""
        grids = self.grids(size, **self.config)
        return BackboneInfo(
            family=self.family,
            stages=tuple(
                StageInfo(
                    depth, dim, grid, grid[0] * grid[1], self.directions, self.known_of(number)
                )
                for number, (depth, dim, grid) in enumerate(
                    zip(self.depths, self.dims, grids, strict=True)
                )
            ),
            unaligned=self.unaligned,
            staged=True,
        )

    def known_of(self, stage: int) -> frozenset[str]:
        """Return the fields of `Intermediates` that mixers of a stage, from 0, can return."""
        del stage
        return OUTPUT | STATE if self.reducible else frozenset()

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse images with a side below the stride of the last stage.

        Raises:
            ValueError: If one is.
        """
        least = FIRST_STRIDE * 2 ** (len(self.dims) - 1)
        if min(size) < least:
            raise ValueError(
                f"img_size is {size[0]} x {size[1]}, expected sides of at least {least} pixels, the"
                f" stride of stage {len(self.dims)}"
            )

    def embed(self, images: Tensor) -> Tensor:
        """Return the first map of images, (batch, in_chans, height, width).

        Raises:
            ValueError: If the images have other channels or are too small.
        """
        check_images(images, next(self.parameters()))
        if images.shape[1] != self.in_chans:
            raise ValueError(
                f"images are {tuple(images.shape)}, expected (batch, {self.in_chans}, height,"
                " width)"
            )
        self.check_size((images.shape[2], images.shape[3]))
        x: Tensor = self.stem(images.permute(0, 2, 3, 1))
        return x

    @property
    def stem(self) -> nn.Module:
        """What maps images, (batch, height, width, in_chans), to the first map."""
        return self.patch_embed

    @property
    def stages(self) -> Sequence[Blocks]:
        """The blocks of each stage; they map a map to one of the same shape."""
        return [cast(Stage, layer).blocks for layer in self.layers]

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order of depth."""
        return [block for blocks in self.stages for block in blocks]

    def next_map(self, stage: int, x: Tensor) -> Tensor:
        """Return the map that the next stage starts from.

        Args:
            stage: Whose output x is, from 0; not the last one.
            x: (batch, height, width, dims[stage]).
        """
        out: Tensor = cast(Stage, self.layers[stage]).downsample(x)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Classify: (batch, in_chans, height, width) -> (batch, num_classes).

        Without pooling there is an output for each cell, (batch, height, width, num_classes).
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map, normalised, (batch, height, width, num_features).

        Args:
            images: (batch, in_chans, height, width), of any size but too small ones.

        Raises:
            ValueError: As `embed`.
        """
        return self.last_map(self._run(images)[0])

    def last_map(self, x: Tensor) -> Tensor:
        """Return what the head is given of the last stage's map: the map, normalised."""
        normed: Tensor = self.get_submodule(self.final_norm)(x)
        return normed

    def feature_norm(self, stage: int, *, norm: bool) -> nn.Module | None:
        """Return what normalises a feature map that `forward_intermediates` returns.

        Args:
            stage: From 0.
            norm: Whether the final norm is wanted for the last stage's.
        """
        final = norm and stage == len(self.dims) - 1
        default = self.get_submodule(self.final_norm) if final else None
        return cast("nn.Module | None", getattr(self, f"outnorm{stage}", default))

    def forward_head(
        self,
        x: Tensor,
        pre_logits: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> Tensor:
        """Pool maps of `forward_features` and classify them.

        Args:
            x: (batch, height, width, num_features).
            pre_logits: Return what the head reads, (batch, num_features).
        """
        if self.global_pool:
            cells = x.flatten(1, 2)  # (batch, length, num_features)
            x = pool_patches(cells, cells.mean(dim=1), self.global_pool)
        x = self.head_drop(x)
        logits: Tensor = x if pre_logits else self.get_classifier()(x)
        return logits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
        stop_early: bool = False,  # noqa: FBT001, FBT002
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,  # noqa: FBT001, FBT002
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return what some of the stages give, before it is downsampled, as timm's models do.

        Args:
            x: Images, (batch, in_chans, height, width).
            indices: Stages from 0, negative ones from the end; a number n for the last n stages;
                None for all.
            norm: Apply the final norm to the last stage's.
            stop_early: Do not run stages behind the last one wanted.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: Return the list alone.

        Returns:
            The map of `forward_features` and the list in the order of the stages, or the list.
            With `out_norms`, each is normalised by its own.

        Raises:
            ValueError: If a stage is not there or the format is unknown.
        """
        wanted = chosen_layers(indices, len(self.dims))
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        x, maps = self._run(x, wanted, stop=wanted[-1] if stop_early else None)
        normed = []
        for stage, each in zip(wanted, maps, strict=True):
            own = self.feature_norm(stage, norm=norm)
            each = each if own is None else own(each)
            normed.append(each.permute(0, 3, 1, 2) if output_fmt == "NCHW" else each)
        return normed if intermediates_only else (self.last_map(x), normed)

    def _run(
        self, images: Tensor, wanted: Sequence[int] = (), *, stop: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return what the last stage that runs, `stop`, gives, and what those of `wanted` give."""
        x, maps = self.embed(images), list[Tensor]()
        hooks = self._hooks((images.shape[2], images.shape[3]))
        for stage, blocks in enumerate(self.stages[: None if stop is None else stop + 1]):
            x = self.next_map(stage - 1, x) if stage else x
            x = blocks(x, hooks[stage]) if stage in hooks else blocks(x)
            if stage in wanted:
                maps.append(x)
        return x, maps

    def _hooks(self, size: tuple[int, int]) -> dict[int, Callable[[int], Hooks]]:
        """Return what blocks are to do in the stages that remove cells of images of a size."""
        if not self.reducible or not self.reduction.reduces:
            return {}
        reduction = self.reduction
        if size != self.img_size:
            reduction = reduction.resized(self.info_on(size))
        stages = map(reduction.stage, range(len(self.dims)))
        return {n: stage.hooks for n, stage in enumerate(stages) if stage.schedule.removed}

    def flop_parts(self) -> HierarchicalCost:
        """Return what an image costs each part; weights may be on the meta device."""
        grids = [stage.grid for stage in self.info.stages]
        rates = zip(self.stages, grids, strict=True)
        leading = [FREE, *(self.leading_cost(n, grid) for n, grid in enumerate(grids[:-1]))]
        return HierarchicalCost(
            patches=map_cost(self.stem, self.img_size),
            leading=tuple(leading),
            blocks=tuple(
                tuple(self.block_cost(block, grid) for block in blocks) for blocks, grid in rates
            ),
            head=self.head_cost(grids[-1]),
        )

    def head_cost(self, grid: tuple[int, int]) -> Cost:
        """Return the cost of what follows the last stage, whose map is `grid`."""
        mean = math.prod(grid) * self.num_features
        return total(
            Cost.of_products(self.num_features * self.num_classes),
            map_cost(self.get_submodule(self.final_norm), grid),
            Cost(mean, mean),
        )

    def branch_costs(
        self, block: nn.Module, grid: tuple[int, int], kept: int | None = None
    ) -> tuple[Cost, Cost]:
        """Return the cost of a block up to its mixer and behind it.

        Args:
            block: Of this model.
            grid: Height and width of the map on which convolutions run.
            kept: Cells that all else works on; all by default.

        Raises:
            ValueError: If the model is not `reducible`.
        """
        raise ValueError(
            f"model is a {type(self).__name__}, expected one whose tokens can be reduced"
        )

    def mixer_width(self, stage: int) -> int:
        """Return the width inside the mixers of a stage, from 0; by default that of a cell."""
        return self.dims[stage]

    def block_cost(self, block: nn.Module, grid: tuple[int, int]) -> Cost:
        """Return the cost of a block on a map of a height and width."""
        return total(*self.branch_costs(block, grid))

    def leading_cost(self, stage: int, grid: tuple[int, int]) -> Cost:
        """Return the cost of what leads from a stage, from 0, whose map is `grid`, to the next."""
        return map_cost(cast(Stage, self.layers[stage]).downsample, grid)

    def finish(self, num_classes: int, *, out_norms: bool) -> None:
        """Add a new head, `out_norms` if they are wanted, and the description."""
        self.reset_classifier(num_classes)
        if out_norms:
            self.add_out_norms()
        self.describe()

    def add_out_norms(self) -> None:
        """Normalise each stage's feature map, as backbones of dense prediction do."""
        for stage, dim in enumerate(self.dims):
            self.add_module(f"outnorm{stage}", nn.LayerNorm(dim))

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None
    ) -> None:
        """Describe images of another size from now on; all sizes are taken anyway.

        Args:
            img_size: Side of an image or (height, width), in pixels.
            patch_size: None: the first stride is fixed.

        Raises:
            ValueError: If images would be too small, or patches have another size.
        """
        if patch_size not in (None, FIRST_STRIDE):
            raise refusal("patch_size", patch_size, str(FIRST_STRIDE))
        size = self.img_size if img_size is None else pair(img_size, name="img_size")
        self.check_size(size)
        if self.reducible and self.reduction.reduces:
            self.reduction = self.reduction.resized(self.info_on(size))
        self.img_size = size
        grid = self.info.stages[-1].grid
        self.pretrained_cfg.update(input_size=(self.in_chans, *size), pool_size=grid)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
        prune_head: bool = True,  # noqa: FBT001, FBT002
    ) -> list[int]:
        """Take away what is not needed for some intermediates.

        Args:
            indices: As for `forward_intermediates`; stages behind the last one go.
            prune_norm: The final norm goes too; it always does with its stage.
            prune_head: The head goes too; if a stage went, one that stays is new.

        Returns:
            The stages that are meant, from 0.
        """
        wanted = chosen_layers(indices, len(self.dims))
        for stage in {*range(len(self.dims))} - {*wanted}:
            self._modules.pop(f"outnorm{stage}", None)
        left, cut = wanted[-1] + 1, wanted[-1] + 1 < len(self.dims)
        if cut:
            self.cut_stages(left)
            self.dims, self.depths = self.dims[:left], self.depths[:left]
            self.num_features = self.head_hidden_size = self.dims[-1]
            del self.feature_info[left:]
            if self.reducible:
                self.reduction = self.reduction.of_first_stages(self.info)
        if prune_norm or cut:
            self.set_submodule(self.final_norm, nn.Identity())
        if prune_head:
            self.reset_classifier(0, "")
        elif cut:
            self.reset_classifier(self.num_classes)
        return wanted

    def cut_stages(self, left: int) -> None:
        """Remove all stages but the first `left`, and what leads to the next one."""
        del self.layers[left:]
        cast(Stage, self.layers[-1]).downsample = nn.Identity()

    def describe(self) -> None:
        """Describe what images are read and what the stages return, in timm's terms."""
        if self.reducible:
            self.reduction = make_staged_reduction(self.info)
        names = {module: name for name, module in self.named_modules()}
        self.feature_info = [
            {"num_chs": dim, "reduction": FIRST_STRIDE * 2**n, "module": names[blocks]}
            for n, (dim, blocks) in enumerate(zip(self.dims, self.stages, strict=True))
        ]
        self.pretrained_cfg = self.default_cfg = data_config(
            type(self),
            img_size=self.img_size,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            **self.config,
        )

    def group_matcher(
        self,
        coarse: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> dict[str, Any]:
        """Return patterns of the names of parameters in the order of depth.

        Args:
            coarse: A stage is a group, not a block.  What leads to a stage belongs to its start.
        """
        leading = [
            (rf"^layers\.{stage - 1}\.downsample", (stage,) if coarse else (stage, 0))
            for stage in range(1, len(self.dims))
        ]
        block = r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.blocks\.(\d+)"
        norms = (rf"^(?:{re.escape(self.final_norm)}|outnorm)", (99999,))
        return {"stem": "^patch_embed", "blocks": [*leading, (block, None), norms]}

    def set_grad_checkpointing(
        self,
        enable: bool = True,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> None:
        """Keep only maps between branches for the backward pass and compute the rest again."""
        for blocks in self.stages:
            blocks.set_grad_checkpointing(enable)
