"""Vision Mamba (Vim): patches in a row, scanned both ways, and fused on the way if wanted.

    image -> patches and class token -> depth x (add, norm, fuse, mix) -> norm -> head

Source: Zhu et al., "Vision Mamba", arXiv:2401.09417; token fusion between its layers: Shen et al.,
"Famba-V", arXiv:2409.09808, section 3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor, nn

from fambav.ecosystem import timm
from fambav.layers.block import AddNorm, Block
from fambav.layers.drop import Dropout, DropPath
from fambav.layers.embed import PatchEmbed, class_places, insert, pair, patch_grid, take
from fambav.layers.mamba import Mamba
from fambav.layers.tokens import Tokens
from fambav.ops.match import others
from fambav.reduction import make_reducer, schedule
from fambav.registry import nearest

Rows = Tensor | tuple[Tensor, Tensor]


class Trace(NamedTuple):
    """Where the tokens went.

    Attributes:
        sources: For each layer, the place after its fusion of the token that each token of the
            start is part of, (batch, start length), int64.
    """

    sources: tuple[Tensor, ...]


class Vim(nn.Module):
    """Isotropic bidirectional Mamba classifier.

    Names, shapes and order of the parameters are those of the published weights.

    Args:
        dim: Width of a token.
        depth: Number of blocks, at least 1.
        img_size: Side of an image or (height, width), in pixels.
        patch_size: Side of a patch, in pixels.
        stride: From one patch to the next, in pixels; patch_size by default.
        in_chans: Channels of an image.
        num_classes: Length of the output; 0 returns the feature.
        class_token: "middle" (as the published weights), "head" (as the Famba-V paper), "double",
            whose features are averaged, or "none", where the head reads the mean over patches, in
            which a fused token counts as often as it stands for patches.
        bimamba_type: Mixer, "v2", "v1" or "none"; see `fambav.layers.mamba`.
        divide_out: Halve the sum of both directions; v2 only.
        state: Numbers of state per channel.
        drop_rate: Dropout after the position embedding, at least 0 and less than 1.
        drop_path_rate: Stochastic depth of the last output; rises linearly from 0.
        legacy_init: Start the backward dt bias at the published zero.
        fusion_strategy, fusion_layer, fusion_token, fusion_method, fusion_plan: See `fuse`.

    Attributes:
        grid: Patches along height and width.
        class_places: Where the class tokens stand at the start.
        length: Tokens at the start, class tokens included.
        schedule: Tokens removed by and left at each layer.
        reducer: Removes them.

    Raises:
        ValueError: If patches do not divide the image, fusion cannot be done or would do nothing,
            or a name or number is not one of those above.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        class_token: str = "middle",
        bimamba_type: str = "v2",
        divide_out: bool = True,
        state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        legacy_init: bool = False,
        fusion_strategy: str = "none",
        fusion_layer: int | None = None,
        fusion_token: int = 0,
        fusion_method: str = "famba-v",
        fusion_plan: str | None = None,
    ) -> None:
        super().__init__()
        self.dim = self.embed_dim = self.num_features = self.head_hidden_size = dim
        self.depth, self.class_token = depth, class_token
        self.img_size = pair(img_size, name="img_size")
        stride = patch_size if stride is None else stride
        self.grid = patch_grid(self.img_size, patch_size=patch_size, stride=stride)
        patches = self.grid[0] * self.grid[1]
        self.class_places = class_places(class_token, patches)
        self.length = patches + len(self.class_places)
        self.fuse(fusion_strategy, fusion_layer, fusion_token, fusion_method, fusion_plan)

        self.class_names = _class_names(class_token)
        for name in self.class_names:
            self.register_parameter(name, nn.Parameter(0.02 * torch.randn(1, 1, dim)))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.length, dim))
        self.patch_embed = PatchEmbed(
            dim, img_size=self.img_size, patch_size=patch_size, stride=stride, in_chans=in_chans
        )
        self.pos_drop = Dropout(drop_rate)
        self.reset_classifier(num_classes)
        mixer = partial(Mamba, dim, bimamba_type=bimamba_type, divide_out=divide_out, state=state)
        rates = drop_path_rates(drop_path_rate, depth)
        self.layers = nn.ModuleList(
            Block(dim, mixer(depth=depth, legacy_init=legacy_init), drop_path=rate)
            for rate in rates
        )
        self.norm_f = AddNorm(dim)
        self.drop_path = DropPath(drop_path_rate)
        self.pretrained_cfg = self.default_cfg = _data_config(self.img_size, in_chans, num_classes)

    def fuse(
        self,
        strategy: str = "none",
        layer: int | None = None,
        token: int = 0,
        method: str = "famba-v",
        plan: str | None = None,
    ) -> None:
        """Choose where tokens are fused.  Has no parameters, so any weights fit any choice.

        Args:
            strategy: Layers that fuse, "none", "all", "interleaved", "lower" or "upper".
            layer: First (upper) or last (lower) layer that does, counted from 1.
            token: Tokens removed by each of them.
            method: How, "famba-v" or "ordered".
            plan: Instead of a strategy, "layer:tokens,..." with layers counted from 1.

        Raises:
            ValueError: If that cannot be done or would do nothing.
        """
        self.schedule = schedule(
            strategy,
            depth=self.depth,
            start=self.length,
            class_places=self.class_places,
            count=token,
            layer=layer,
            method=method,
            plan=plan,
        )
        self.reducer = make_reducer(method, self.schedule.counts)

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
            images: Of the size the model was built for.
            trace: Also tell where each token went.

        Returns:
            The feature that the head reads; with trace, the feature and a `Trace`.

        Raises:
            ValueError: If the images have another size.
        """
        tokens, sources = self.embed(images, trace=trace), []
        for layer, block in enumerate(self.layers):
            tokens = block(tokens, between=partial(self.reducer, layer=layer))
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

    def embed(self, images: Tensor, *, trace: bool = False) -> Tokens:
        """Cut images into patches, put the class tokens among them and add where each stands."""
        class_tokens = [getattr(self, name) for name in self.class_names]
        x = insert(self.patch_embed(images), class_tokens, self.class_places)
        x = self.pos_drop(x + self.pos_embed)
        return Tokens.start(x, class_places=self.class_places, trace=trace)

    def pool(self, tokens: Tokens) -> Tensor:
        """Return the feature, (batch, dim): class tokens where they are now, or all patches."""
        x, residual = self.drop_path(tokens.x), cast(Tensor, tokens.residual)
        if self.class_places:  # each row is normalised on its own, so only these are
            x, residual = take(x, tokens.class_places), take(residual, tokens.class_places)
            rows: Tensor = self.norm_f(x, residual)[0]
            return rows.mean(dim=1)
        share = tokens.size / tokens.size.sum(dim=1, keepdim=True)
        mean: Tensor = (self.norm_f(x, residual)[0] * share[..., None]).sum(dim=1)
        return mean

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
                tokens that were fused and no longer form a grid.
        """
        wanted = _layers(indices, self.depth)
        last = max(wanted)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        if output_fmt == "NCHW" and self.schedule.lengths[last] < self.length:
            raise ValueError("output_fmt is 'NCHW', expected 'NLC' for tokens that were fused")
        tokens, found = self.embed(x), list[Rows]()
        for layer, block in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            tokens = block(tokens, between=partial(self.reducer, layer=layer))
            if layer in wanted:
                rows = self.norm_f(tokens.x, tokens.residual)[0 if norm else 1]
                patches = take(rows, others(tokens.class_places, rows.shape[1]))
                patches = patches.mT.unflatten(2, self.grid) if output_fmt == "NCHW" else patches
                prefix = take(rows, tokens.class_places)
                found.append((patches, prefix) if return_prefix_tokens else patches)
        return found if intermediates_only else (self.pool(tokens), found)

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one of `num_classes` outputs; 0 for none.

        Raises:
            ValueError: If num_classes is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, expected 0 or more")
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.dim, num_classes)
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head = self.head.to(self.pos_embed).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay would pull away from what they mean."""
        kept = ("A_log", "A_b_log", "D", "D_b", "pos_embed", *self.class_names)
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in kept}

    def set_grad_checkpointing(
        self,
        enable: bool = True,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> None:
        """Keep only each block's input for the backward pass and compute the rest again."""
        for block in self.layers:
            cast(Block, block).grad_checkpointing = enable


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rate for what each block receives: 0, then linear from 0 towards `rate` at the output.

    Block i drops the output of block i - 1, so the first two rates are 0 and `rate` itself belongs
    to the output of the last block.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}, expected at least 1")
    return [0.0, *(rate * layer / (depth - 1) for layer in range(depth - 1))]


def _class_names(class_token: str) -> tuple[str, ...]:
    """Names of the class tokens' parameters, in the order of the sequence."""
    if class_token == "none":
        return ()
    return ("cls_token_head", "cls_token_tail") if class_token == "double" else ("cls_token",)


def _layers(indices: int | Sequence[int] | None, depth: int) -> set[int]:
    """Resolve timm's way of naming layers: all, the last n, or a list that may count backwards."""
    if indices is None or isinstance(indices, int):
        indices = range(-(depth if indices is None else indices), 0)
    if not indices or not all(-depth <= index < depth for index in indices):
        wanted = list(indices)
        raise ValueError(f"indices are {wanted}, expected some of {-depth} to {depth - 1}")
    return {index % depth for index in indices}


def _data_config(img_size: tuple[int, int], in_chans: int, num_classes: int) -> dict[str, Any]:
    """Say what images the model reads, in timm's words."""
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (in_chans, *img_size),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


_PUBLISHED: dict[str, dict[str, int]] = {
    "tiny_patch16_224": {"dim": 192, "depth": 24},
    "tiny_patch16_stride8_224": {"dim": 192, "depth": 24, "stride": 8},
    "small_patch16_224": {"dim": 384, "depth": 24},
    "small_patch16_stride8_224": {"dim": 384, "depth": 24, "stride": 8},
    "base_patch16_224": {"dim": 768, "depth": 24},
}
VARIANTS: dict[str, dict[str, int]] = {
    "vim_tiny": {"dim": 192, "depth": 24},
    "vim_small": {"dim": 384, "depth": 24},
    "vim_base": {"dim": 768, "depth": 24},
    "vim_micro": {"dim": 64, "depth": 6, "img_size": 32, "patch_size": 4},
    **{  # the names of Vim's and Famba-V's code, all of which mean a class token in the middle
        f"vim_{form}_bimambav2_final_pool_mean_abs_pos_embed_with_{place}_div2": config
        for form, config in _PUBLISHED.items()
        for place in ("midclstok", "middle_cls_token")
    },
}
_ARGUMENTS = tuple(inspect.signature(Vim).parameters)
_TIMMS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


def _entry_point(name: str, config: dict[str, int]) -> Callable[..., Vim]:
    """Return the function that timm calls to build `name`."""

    def build(cache_dir: object = None, **arguments: Any) -> Vim:
        del cache_dir  # nothing is fetched
        for known in _TIMMS:
            if arguments.pop(known, None):
                raise ValueError(
                    f"{known} is set, expected none: {name} is built with new weights;"
                    " load a file of weights into it"
                )
        for unknown in set(arguments) - set(_ARGUMENTS):
            hint = nearest(unknown, _ARGUMENTS)
            raise ValueError(f"{unknown!r} is no argument of {name}; {hint}")
        model = Vim(**{**config, **arguments})
        model.pretrained_cfg["architecture"] = name
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build Vim with {config} and the other arguments of `Vim`."
    return build


for _name, _config in VARIANTS.items():
    globals()[_name] = timm.models.register_model(_entry_point(_name, _config))
