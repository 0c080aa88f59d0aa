"""A stack of equal layers over a sequence of tokens, and what timm asks of such a model.

images -> embed -> depth x layer, each with the hooks of a reduction -> pool -> head
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor, nn

from fambav.layers.block import Add, Hooks
from fambav.layers.drop import DropPath
from fambav.layers.embed import cls_index_of, pair, patch_grid
from fambav.layers.info import BackboneInfo
from fambav.layers.mamba import Mamba
from fambav.layers.tokens import Tokens, take_rows
from fambav.models.entry import chosen_layers, data_config
from fambav.models.flops import ModelCost
from fambav.models.weights import adapt, official, published_class_token, resize_pos_embed
from fambav.ops.match import others
from fambav.reduction import Reduction, Schedule, no_reduction, unmerge
from fambav.registry import FAMILIES

Rows = Tensor | tuple[Tensor, Tensor]


class Trace(NamedTuple):
    """Where the tokens went.

    Attributes:
        sources: For each layer, the place behind it of the token that each token of the start is
            part of, -1 for one that was dropped, (batch, start length), int64.
    """

    sources: tuple[Tensor, ...]


class Backbone(nn.Module):
    """A classifier of layers that map tokens to tokens of the same width.

    Attributes:
        dim: Width of a token.
        depth: Number of layers.
        img_size: Height and width of an image, in pixels.
        grid: Patches along height and width.
        length: Tokens at the start, class tokens included.
        patch_embed: Has `in_chans`, the channels of an image.
        layers: They map tokens and `Hooks` to tokens, and have `grad_checkpointing`.
        reduction: Removes tokens; may be replaced at any time, see `fambav.reduce`.
        undecayed: Last names of the parameters that weight decay would pull away from what they
            mean.
        classifier, first_conv, final_norm, position: Names of the modules that give the output,
            read the image and normalise the sum of all layers, and of the position embedding.
        fixed_input_size: Whether images of another size are refused.
        global_pool: What the head reads, see `reset_classifier`.
        feature_info: Channels and stride of each layer, in timm's words.
        draws_whole_update: Whether a forward pass draws random numbers for all batches of an
            update and keeps its share, so that all batches start from one seed.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()
    classifier: ClassVar[str] = "head"
    first_conv: ClassVar[str] = "patch_embed.proj"
    position: ClassVar[str] = "pos_embed"
    final_norm: ClassVar[str] = "norm_f"
    fixed_input_size: ClassVar[bool] = True
    draws_whole_update: ClassVar[bool] = True
    dim: int
    depth: int
    img_size: tuple[int, int]
    grid: tuple[int, int]
    length: int
    patch_embed: Any
    layers: Any
    drop_path: DropPath
    head: nn.Module
    reduction: Reduction
    num_classes: int
    pretrained_cfg: dict[str, Any]
    class_token: str
    cls_index: tuple[int, ...]
    patch_size: int
    stride: int
    in_chans: int
    global_pool: str
    feature_info: list[dict[str, Any]]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a reduction is in training or evaluation as the model is."""
        if isinstance(value, Reduction):
            value.train(self.training)
        super().__setattr__(name, value)

    @property
    @abstractmethod
    def info(self) -> BackboneInfo:
        """What a reduction has to know."""

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
        """Tokens removed by and left at each layer."""
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
        del tokens
        return self.reduction.hooks(layer)

    def forward(self, images: Tensor) -> Tensor:
        """Classify: (batch, in_chans, height, width) -> (batch, num_classes).

        Without pooling there is an output for each token of the start, (batch, tokens, classes).
        """
        tokens, _ = self._run(images, trace=not self.global_pool and self.schedule.removed > 0)
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
            trace: Also tell where each token went.

        Returns:
            A row for each token of the start, class tokens at `info.cls_index`.  Members of a
            merged token have its row; a dropped one has the mean over the patches that are left,
            so that the mean over all is theirs.  With trace, these and a `Trace`.

        Raises:
            ValueError: If the images have another size.
        """
        tokens, sources = self._run(images, trace=trace or self.schedule.removed > 0)
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
        """
        index = torch.tensor([self.info.cls_index], dtype=torch.int64, device=x.device)
        index = index.expand(len(x), -1)
        if self.global_pool == "token":
            x = take_rows(x, index).mean(dim=1)
        elif self.global_pool == "avg":
            x = take_rows(x, others(index, x.shape[1])).mean(dim=1)
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
            merged token have its own, dropped ones the mean over the patches that are left.

        Raises:
            ValueError: If a layer is not there or the format is unknown.
        """
        wanted = chosen_layers(indices, self.depth)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        tokens, found = self.embed(x, trace=self.schedule.removed > 0), list[Rows]()
        grid, length = cast("tuple[int, int]", tokens.grid), tokens.x.shape[1]
        index = torch.tensor([self.info.cls_index], dtype=torch.int64, device=x.device)
        index = index.expand(len(x), -1)
        last = wanted[-1] + 1 if stop_early else self.depth
        for layer, block in enumerate(self.layers[:last]):
            tokens = block(tokens, self.hooks(layer, tokens))
            if layer in wanted:
                rows = self._rows(tokens, norm=norm)
                patches = take_rows(rows, others(index, length))
                if output_fmt == "NCHW":
                    patches = patches.mT.unflatten(2, grid)
                found.append((patches, take_rows(rows, index)) if return_prefix_tokens else patches)
        return found if intermediates_only else (self._whole(tokens), found)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
        prune_head: bool = True,  # noqa: FBT001, FBT002
    ) -> list[int]:
        """Take away what is not needed for some intermediates.

        Args:
            indices: As for `forward_intermediates`; layers behind the last one go.
            prune_norm: The final norm goes too.
            prune_head: The head goes too.

        Returns:
            The layers that are meant, from 0.
        """
        wanted = chosen_layers(indices, self.depth)
        self.depth = wanted[-1] + 1
        del self.layers[self.depth :], self.feature_info[self.depth :]
        self.reduction = self.reduction.of_first_layers(self.info)
        if prune_norm:
            self.set_submodule(self.final_norm, Add())
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None
    ) -> None:
        """Take images of another size from now on; the position embedding is resized.

        Args:
            img_size: Side of an image or (height, width), in pixels.
            patch_size: No other than the model's.

        Raises:
            ValueError: If patches do not divide the images, would have another size, or tokens
                are reduced, whose schedule is for the size that there is.
        """
        if patch_size not in (None, self.patch_size):
            raise ValueError(f"patch_size is {patch_size}, expected {self.patch_size}")
        size = self.img_size if img_size is None else pair(img_size, name="img_size")
        if size == self.img_size:
            return
        if self.schedule.removed:
            raise ValueError(
                f"img_size is {size}, expected {self.img_size} while tokens are reduced;"
                " reduce(model, 'none') ends that"
            )
        old, embedding = self.grid, self.get_parameter(self.position)
        self.lay_out(size)
        owner, _, name = self.position.rpartition(".")
        resized = nn.Parameter(
            resize_pos_embed(embedding.detach(), self, old), requires_grad=embedding.requires_grad
        )
        setattr(self.get_submodule(owner), name, resized)
        self.reduction = no_reduction(self.info)
        self.pretrained_cfg.update(input_size=(self.in_chans, *size), pool_size=self.grid)
        self._traits = {**getattr(self, "_traits", {}), "img_size": size}  # timm's own record

    def lay_out(self, img_size: tuple[int, int]) -> None:
        """Set the grid of patches, and the places of class tokens, for images of a size."""
        self.grid = patch_grid(img_size, patch_size=self.patch_size, stride=self.stride)
        self.img_size = img_size
        patches = self.grid[0] * self.grid[1]
        self.cls_index = cls_index_of(self.class_token, patches)
        self.length = patches + len(self.cls_index)

    def describe(self) -> None:
        """Say what images are read and what the layers return, in timm's words."""
        inside = self.position.rpartition("pos_embed")[0]
        self.feature_info = [
            {"num_chs": self.dim, "reduction": self.stride, "module": f"{inside}layers.{layer}"}
            for layer in range(self.depth)
        ]
        self.pretrained_cfg = self.default_cfg = data_config(
            type(self),
            img_size=self.img_size,
            patch_size=self.patch_size,
            stride=self.stride,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
        )

    def group_matcher(
        self,
        coarse: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> dict[str, Any]:
        """Return patterns of the names of parameters in the order of depth: a layer is a group."""
        del coarse  # a layer is the smallest group
        inside = re.escape(self.position.rpartition("pos_embed")[0])
        return {
            "stem": rf"^{inside}(?:cls_token|pos_embed|patch_embed)",
            "blocks": [
                (rf"^{inside}layers\.(\d+)", None),
                (rf"^{re.escape(self.final_norm)}", (99999,)),
            ],
        }

    def get_classifier(self) -> nn.Module:
        """Return the head's linear map."""
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one.

        Args:
            num_classes: Its outputs; 0 for none.
            global_pool: "token", the class tokens' mean; "avg", the mean over patches; "" for
                every token by itself; None as before.

        Raises:
            ValueError: If num_classes is negative, or there is no such pooling.
        """
        if global_pool is not None:
            self.global_pool = self._pooling(global_pool)
        like = self.get_parameter(self.position)
        owner, _, name = self.classifier.rpartition(".")
        setattr(self.get_submodule(owner), name, self._new_head(num_classes, like))

    def pool(self, tokens: Tokens) -> Tensor:
        """Return the feature, (batch, dim): class tokens where they are now, or all patches.

        Without pooling, the rows of `forward_features`.
        """
        if not self.global_pool:
            return self._whole(tokens)
        tokens = tokens.kept()
        tokens = tokens._replace(x=self.drop_path(tokens.x))
        if self.global_pool == "token":  # each row is normalised on its own, so only these are
            x = take_rows(tokens.x, tokens.cls_index)
            residual = take_rows(cast(Tensor, tokens.residual), tokens.cls_index)
            return self.normed(tokens._replace(x=x, residual=residual))[0].mean(dim=1)
        return mean_patch(self.normed(tokens)[0], tokens)

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
        left = tokens.kept()
        if norm:
            rows = self.normed(left)[0]
        else:
            rows = Add()(left.x, left.residual)[1].to(self.get_parameter(self.position).dtype)
        if left.source is None or not self.schedule.removed:
            return rows
        return unmerge(rows, left.source, mean_patch(rows, left))

    def _pooling(self, name: str | None) -> str:
        """Return the name of a pooling that this model has; None for its own."""
        known = ("token", "avg", "") if self.cls_index else ("avg", "")
        if name is None:
            return known[0]
        if name not in known:
            able = " or ".join(map(repr, known))
            raise ValueError(f"global_pool is {name!r}, expected {able} of this model")
        return name

    def remap(
        self,
        payload: Mapping[str, Any],
        *,
        ema: bool = False,
        class_token: str | None = None,
        grid: tuple[int, int] | None = None,
        head: Literal["strict", "drop"] = "strict",
    ) -> dict[str, Tensor]:
        """Pick the weights out of what a file holds, ours or a published one, and fit them.

        Args:
            payload: As for `official`.
            ema: Take the moving average.
            class_token: Where the class token stood in training; None asks the file.
            grid: As for `adapt`.
            head: As for `adapt`.

        Returns:
            Weights that load strictly into this model.

        Raises:
            ValueError: As `official` and `adapt`.
        """
        weights, place = official(payload, ema=ema), None
        if "class_token" in FAMILIES[self.info.family].arguments:
            place = class_token or published_class_token(payload)
        return adapt(weights, self, class_token=place, grid=grid, head=head)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay would pull away from what they mean."""
        return {
            name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in self.undecayed
        }

    def set_grad_checkpointing(
        self,
        enable: bool = True,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again."""
        for block in self.layers:
            block.grad_checkpointing = enable

    def _new_head(self, num_classes: int, like: Tensor) -> nn.Module:
        """Return a classifier of `num_classes` outputs, 0 for none, beside `like`.

        Raises:
            ValueError: If num_classes is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, expected 0 or more")
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.dim, num_classes)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        return head.to(like).train(self.training)


def mean_patch(rows: Tensor, tokens: Tokens) -> Tensor:
    """Average rows of patches, (batch, length, dim), each as often as it stands for patches."""
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
    if depth < 1:
        raise ValueError(f"depth is {depth}, expected at least 1")
    return [0.0, *(rate * layer / (depth - 1) for layer in range(depth - 1))]
