"""A stack of equal layers over a sequence of tokens, and what timm asks of such a model.

images -> embed -> depth x layer, each with the hooks of a reduction -> pool -> head
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, overload

from torch import Tensor, nn

from fambav.layers.block import Hooks
from fambav.layers.embed import take
from fambav.layers.info import BackboneInfo
from fambav.layers.mamba import Mamba
from fambav.layers.tokens import Tokens
from fambav.models.entry import chosen_layers
from fambav.models.flops import Parts
from fambav.models.weights import adapt, official, published_class_token
from fambav.ops.match import others
from fambav.reduction import Reduction, Schedule
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
        classifier, first_conv, position: Names of the modules that give the output and read the
            image, and of the position embedding.
        draws_whole_update: Whether a forward pass draws random numbers for all batches of an
            update and keeps its share, so that all batches start from one seed.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()
    classifier: ClassVar[str] = "head"
    first_conv: ClassVar[str] = "patch_embed.proj"
    position: ClassVar[str] = "pos_embed"
    draws_whole_update: ClassVar[bool] = True
    dim: int
    depth: int
    img_size: tuple[int, int]
    grid: tuple[int, int]
    length: int
    patch_embed: Any
    layers: Any
    head: nn.Module
    reduction: Reduction
    num_classes: int
    pretrained_cfg: dict[str, Any]
    class_token: str
    class_places: tuple[int, ...]

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
    def flop_parts(self) -> Parts:
        """Return what the parts cost an image; weights may be on the meta device."""

    @abstractmethod
    def embed(self, images: Tensor, *, trace: bool = False) -> Tokens:
        """Make tokens of images, (batch, in_chans, height, width)."""

    @abstractmethod
    def normed(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the final norm of the residual stream's last sum, and the sum."""

    @abstractmethod
    def pool(self, tokens: Tokens) -> Tensor:
        """Return the feature, (batch, dim), of the tokens behind the last layer."""

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
        """Classify: (batch, in_chans, height, width) -> (batch, num_classes)."""
        return self.forward_head(self.forward_features(images))

    @overload
    def forward_features(self, images: Tensor, *, trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward_features(self, images: Tensor, *, trace: Literal[True]) -> tuple[Tensor, Trace]: ...

    def forward_features(
        self, images: Tensor, *, trace: bool = False
    ) -> Tensor | tuple[Tensor, Trace]:
        """Embed: (batch, in_chans, height, width) -> (batch, dim).

        Args:
            images: Of a size that the model takes.
            trace: Also tell where each token went.

        Returns:
            The feature that the head reads; with trace, the feature and a `Trace`.

        Raises:
            ValueError: If the images have another size.
        """
        tokens, sources = self.embed(images, trace=trace), []
        for layer, block in enumerate(self.layers):
            tokens = block(tokens, self.hooks(layer, tokens))
            sources.append(tokens.source)
        feature = self.pool(tokens)
        return (feature, Trace(tuple(sources))) if trace else feature

    def forward_head(
        self,
        x: Tensor,
        pre_logits: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> Tensor:
        """Classify features: (batch, dim) -> (batch, num_classes), or x itself if pre_logits."""
        logits: Tensor = x if pre_logits else self.head(x)
        return logits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Rows] | tuple[Tensor, list[Rows]]:
        """Return what the residual stream holds after some of the layers, as timm's models do.

        Args:
            x: Images, (batch, in_chans, height, width).
            indices: Layers from 0, negative ones from the end; a number n for the last n layers;
                None for all.
            return_prefix_tokens: Return pairs (patches, class tokens) instead of patches.
            norm: Apply the final norm.
            stop_early: Do not run layers behind the last one wanted.
            output_fmt: "NCHW", (batch, dim, *grid), or "NLC", (batch, length, dim), in the order
                of the sequence; class tokens are taken out of both.
            intermediates_only: Return the list alone.

        Returns:
            The feature of `forward_features` and the list in the order of the layers, or the list.

        Raises:
            ValueError: If a layer is not there, the format is unknown, or "NCHW" is wanted of
                tokens that no longer form a grid.
        """
        wanted = chosen_layers(indices, self.depth)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        tokens, found = self.embed(x), list[Rows]()
        last = max(wanted) + 1 if stop_early else self.depth
        for layer, block in enumerate(self.layers[:last]):
            tokens = block(tokens, self.hooks(layer, tokens))
            if layer in wanted:
                left = tokens.living()
                rows = self.normed(left)[0 if norm else 1]
                patches = take(rows, others(left.class_places, rows.shape[1]))
                if output_fmt == "NCHW":
                    patches = _on_grid(patches, left.grid)
                prefix = take(rows, left.class_places)
                found.append((patches, prefix) if return_prefix_tokens else patches)
        return found if intermediates_only else (self.pool(tokens), found)

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

    def new_head(self, num_classes: int, like: Tensor) -> nn.Module:
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
    """Average rows, (batch, length, dim), each as often as its token stands for patches."""
    share = tokens.size / tokens.size.sum(dim=1, keepdim=True)
    return (rows * share[..., None]).sum(dim=1)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rate for what each block receives: 0, then linear from 0 towards `rate` at the output.

    Block i drops the output of block i - 1, so the first two rates are 0 and `rate` itself belongs
    to the output of the last block.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}, expected at least 1")
    return [0.0, *(rate * layer / (depth - 1) for layer in range(depth - 1))]


def _on_grid(patches: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Lay patches, (batch, length, dim), out as (batch, dim, *grid).

    Raises:
        ValueError: If they form no grid.
    """
    if grid is None:
        raise ValueError("output_fmt is 'NCHW', expected 'NLC' for tokens that form no grid")
    maps: Tensor = patches.mT.unflatten(2, grid)
    return maps
