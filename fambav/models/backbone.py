"""A stack of equal layers over a sequence of tokens.

images -> embed -> depth x layer, each with the hooks of a reduction -> pool -> head
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from fambav.arguments import instance, probability
from fambav.layers.block import Add, Hooks
from fambav.layers.drop import DropPath
from fambav.layers.embed import cls_index_of
from fambav.layers.mamba import Mamba
from fambav.layers.tokens import Tokens
from fambav.models.entry import chosen_layers
from fambav.models.flops import ModelCost
from fambav.models.isotropic import Isotropic
from fambav.models.timm_model import pool_patches
from fambav.ops.cross_scan import select_rows
from fambav.ops.match import others
from fambav.reduction import Schedule, unmerge

Rows = Tensor | tuple[Tensor, Tensor]


class Trace(NamedTuple):
    """Where the tokens went.

    Attributes:
        sources: For each layer, the index behind it of the token that each token of the start is
            part of, -1 for one that was dropped, (batch, start length), int64.
    """

    sources: tuple[Tensor, ...]


class Backbone(Isotropic):
    """A classifier of layers that map tokens to tokens of the same width.

    Attributes:
        patch_embed: Has `in_chans`, the channels of an image.
        layers: They map tokens and `Hooks` to tokens, and have `grad_checkpointing`.
    """

    patch_embed: Any
    drop_path: DropPath
    head: nn.Module

    @abstractmethod
    def flop_parts(self) -> ModelCost:
        """Return what an image costs each part; weights may be on the meta device."""

    @abstractmethod
    def embed(self, images: Tensor, *, trace: bool = False) -> Tokens:
        """Make tokens of images, (batch, in_chans, height, width)."""

    @abstractmethod
    def normed(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the final norm of the residual stream's last sum, and the sum."""

    @property
    def schedule(self) -> Schedule:
        """Tokens removed by and kept at each layer."""
        return self.reduction.schedule

    @property
    def unfused(self) -> dict[str, str]:
        """Sub-modules because of which a mixer does not run fused: `{name: reason}`, one a mixer.

        They were replaced (adapters, quantization), hooked or parametrized, and are called.
        """
        found = {
            name: module.unfused
            for name, module in self.named_modules()
            if isinstance(module, Mamba)
        }
        return {f"{name}.{part[0]}": part[1] for name, part in found.items() if part is not None}

    def name_mixers(self) -> None:
        """Give mixers their names in this model, and one list of what a warning has named."""
        warned: list[str] = []
        for name, module in self.named_modules():
            if isinstance(module, Mamba):
                module.name, module.warned = name, warned

    def hooks(self, layer: int, tokens: Tokens) -> Hooks:
        """Return what a layer, from 0, is to do with these tokens."""
        reduction, grid = self.reduction, tokens.start_grid
        if grid is not None and grid != self.grid:
            reduction = reduction.resized(self.info_on(grid))
        return reduction.hooks(layer)

    def forward(self, images: Tensor) -> Tensor:
        """Classify: (batch, in_chans, height, width) -> (batch, num_classes).

        Without pooling there is an output for each token of the start, (batch, tokens, classes).
        On images of another size (`dynamic_img_size`) a reduction's schedule is read anew for their
        tokens.
        """
        tokens, _ = self._run(images, trace=not self.global_pool and self.reduction.reduces)
        return self.classify(tokens)

    def classify(self, tokens: Tokens) -> Tensor:
        """Return what the head makes of the tokens behind the last layer."""
        logits: Tensor = self.head(self.pool(tokens))
        return logits

    @overload
    def forward_features(self, images: Tensor, *, trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward_features(self, images: Tensor, *, trace: Literal[True]) -> tuple[Tensor, Trace]: ...

    def forward_features(
        self, images: Tensor, *, trace: bool = False
    ) -> Tensor | tuple[Tensor, Trace]:
        """Embed: (batch, in_chans, height, width) -> (batch, tokens, dim), normalised, unpooled.

        Args:
            images: Of a size that the model takes.
            trace: Also return where each token went.

        Returns:
            A row for each token of the start, class tokens at `info.cls_index`.  Members of a
            merged token have its row; a dropped one has the mean over the kept patches,
            so that the mean over all is theirs.  With trace, these and a `Trace`.

        Raises:
            ValueError: If the model takes no images of their size.
        """
        tokens, sources = self._run(images, trace=trace or self.reduction.reduces)
        rows = self._whole(tokens)
        return (rows, Trace(tuple(cast("list[Tensor]", sources)))) if trace else rows

    def forward_head(
        self,
        x: Tensor,
        pre_logits: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> Tensor:
        """Pool rows of `forward_features`, (batch, tokens, dim), and classify them.

        Args:
            x: The rows.
            pre_logits: Return what the head reads, (batch, dim).

        Raises:
            ValueError: If the rows have another shape.
        """
        instance("x", x, Tensor, "a tensor (batch, tokens, dim)")
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, tokens, {self.dim})")
        places = cls_index_of(self.class_token, x.shape[1] - len(self.cls_index))
        index = torch.tensor([places], dtype=torch.int64, device=x.device).expand(len(x), -1)
        if self.global_pool == "token":
            x = select_rows(x, index).mean(dim=1)
        elif self.global_pool:
            patches = select_rows(x, others(index, x.shape[1]))
            x = pool_patches(patches, patches.mean(dim=1), self.global_pool)
        logits: Tensor = x if pre_logits else self.head(x)
        return logits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
        norm: bool = False,  # noqa: FBT001, FBT002
        stop_early: bool = False,  # noqa: FBT001, FBT002
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,  # noqa: FBT001, FBT002
    ) -> list[Rows] | tuple[Tensor, list[Rows]]:
        """Return what the residual stream holds after some of the layers, as timm's models do.

        Args:
            x: Images, (batch, in_chans, height, width).
            indices: Layers from 0, negative ones from the end; a number n for the last n layers;
                None for all.
            return_prefix_tokens: Return pairs (patches, class tokens) instead of patches.
            norm: Apply the final norm.
            stop_early: Do not run layers behind the last one wanted.
            output_fmt: "NCHW", (batch, dim, *grid), or "NLC", (batch, patches, dim), row by row.
            intermediates_only: Return the list alone.

        Returns:
            The rows of `forward_features` and the list in the order of the layers, or the list.
            There is a value for each patch of the start: as in `forward_features`, members of a
            merged token have its own, dropped ones the mean over the kept patches.

        Raises:
            ValueError: If a layer is not there or the format is unknown.
        """
        wanted = chosen_layers(indices, self.depth)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        tokens, found = self.embed(x, trace=self.reduction.reduces), list[Rows]()
        grid, length = cast("tuple[int, int]", tokens.grid), tokens.x.shape[1]
        index = tokens.cls_index
        last = wanted[-1] + 1 if stop_early else self.depth
        for layer, block in enumerate(self.layers[:last]):
            tokens = block(tokens, self.hooks(layer, tokens))
            if layer in wanted:
                rows = self._rows(tokens, norm=norm)
                patches = select_rows(rows, others(index, length))
                if output_fmt == "NCHW":
                    patches = rearrange(patches, "b (h w) c -> b c h w", h=grid[0])
                found.append(
                    (patches, select_rows(rows, index)) if return_prefix_tokens else patches
                )
        return found if intermediates_only else (self._whole(tokens), found)

    def pool(self, tokens: Tokens) -> Tensor:
        """Return the feature, (batch, dim): class tokens where they are now, or all patches.

        Without pooling, the rows of `forward_features`.
        """
        if not self.global_pool:
            return self._whole(tokens)
        tokens = tokens.kept()
        tokens = tokens._replace(x=self.drop_path(tokens.x))
        if self.global_pool == "token":  # each row is normalised on its own, so only these are
            x = select_rows(tokens.x, tokens.cls_index)
            residual = select_rows(cast(Tensor, tokens.residual), tokens.cls_index)
            return self.normed(tokens._replace(x=x, residual=residual))[0].mean(dim=1)
        rows = self.normed(tokens)[0]
        mean = mean_patch(rows, tokens)
        if self.global_pool == "avg":
            return mean
        patches = select_rows(rows, others(tokens.cls_index, rows.shape[1]))
        return pool_patches(patches, mean, self.global_pool)

    def _run(self, images: Tensor, *, trace: bool) -> tuple[Tokens, list[Tensor | None]]:
        """Send images through all layers; with trace, also return `source` behind each."""
        tokens, sources = self.embed(images, trace=trace), []
        for layer, block in enumerate(self.layers):
            tokens = block(tokens, self.hooks(layer, tokens))
            sources.append(tokens.source)
        return tokens, sources

    def _whole(self, tokens: Tokens) -> Tensor:
        """Return a normalised row for each token of the start, behind the last layer."""
        return self._rows(tokens._replace(x=self.drop_path(tokens.x)), norm=True)

    def _rows(self, tokens: Tokens, *, norm: bool) -> Tensor:
        """Return the residual stream's sum, (batch, start length, dim), normalised if wanted."""
        kept = tokens.kept()
        if norm:
            rows = self.normed(kept)[0]
        else:
            rows = Add()(kept.x, kept.residual)[1].to(self.get_parameter(self.position).dtype)
        if kept.source is None or rows.shape[1] == kept.source.shape[1]:
            return rows
        return unmerge(rows, kept.source, mean_patch(rows, kept))


def mean_patch(rows: Tensor, tokens: Tokens) -> Tensor:
    """Average rows of patches, (batch, length, dim), weighted by the patches behind each."""
    size = tokens.size
    if tokens.cls_index.shape[1]:
        size = size.scatter(1, tokens.cls_index, 0)
    share = size / size.sum(dim=1, keepdim=True)
    return (rows * share[..., None]).sum(dim=1).to(rows.dtype)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rate for what each block receives: 0, then linear from 0 towards `rate` at the output.

    Block i drops the output of block i - 1, so the first two rates are 0 and `rate` itself belongs
    to the output of the last block.
    """
    probability("drop_path_rate", rate)
    return [0.0, *(rate * layer / (depth - 1) for layer in range(depth - 1))]
