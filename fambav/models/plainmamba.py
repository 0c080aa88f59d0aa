"""PlainMamba: patches on a grid that keeps its shape, scanned along four snakes.

    image -> convolutions and position -> depth x (add, norm, reduce, mix) -> norm -> mean -> head

Source: Yang et al., "PlainMamba", arXiv:2403.17695.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fambav.arguments import MOST_LAYERS, flags, is_number, refusal, whole
from fambav.layers.block import NO_HOOKS, Hooks, ResidualBlock
from fambav.layers.drop import DropPath
from fambav.layers.embed import check_images, resize_positions
from fambav.layers.info import BackboneInfo, Stage
from fambav.layers.mamba2d import (
    DIRECTIONS,
    UNALIGNED,
    Mamba2D,
    apply_on_grid,
    grid_position,
)
from fambav.layers.tokens import INTERMEDIATES, Tokens, zero_masked
from fambav.models.backbone import Backbone, drop_path_rates
from fambav.models.entry import register
from fambav.models.flops import Cost, ModelCost, mamba2d_cost, stem_cost
from fambav.reduction import no_reduction

STEM = 64  # channels before the projection to tokens


class AddLayerNorm(nn.LayerNorm):
    """Add to the residual stream, which stays in float32, and normalise the sum."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # two streams
        """Return the normalised sum in x's dtype, and the sum, both shaped like x."""
        total = x.to(torch.promote_types(x.dtype, torch.float32))
        if residual is not None:
            total = residual + total
        weight, bias = self.weight.to(total.dtype), self.bias.to(total.dtype)
        return F.layer_norm(total, self.normalized_shape, weight, bias, self.eps).to(x.dtype), total


class Layer(ResidualBlock):
    """A mixer on the normalised residual stream.

    Args:
        dim: Width of a token.
        mixer: Of the grid.
        drop_path: Probability that a sample skips the output of the layer before.
        dwconv: Convolve the sum behind the mixer, each channel for itself.
    """

    def __init__(self, dim: int, mixer: Mamba2D, *, drop_path: float, dwconv: bool) -> None:
        super().__init__()
        # Names and order are those of the published weights.
        self.norm = AddLayerNorm(dim, eps=1e-5)
        self.dw: nn.Sequential | None = None
        if dwconv:
            conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
            self.dw = nn.Sequential(conv, nn.BatchNorm2d(dim), nn.GELU())
        self.mamba = mixer
        self.drop_path = DropPath(drop_path)

    @property
    def mixer(self) -> Mamba2D:  # type: ignore[override]  # its weights have another name
        """The mixer, under the name that it has in other models."""
        return self.mamba

    def forward(self, tokens: Tokens, hooks: Hooks = NO_HOOKS) -> Tokens:
        """Do what a `ResidualBlock` does; behind a convolution, x is the sum, without a residual.

        Args:
            tokens: Output of the layer before; without a residual in the first layer.
            hooks: May return fewer tokens.
        """
        tokens = super().forward(tokens, hooks)
        if self.dw is None:
            return tokens
        total = (cast(Tensor, tokens.residual) + tokens.x).to(tokens.x.dtype)
        x = apply_on_grid(total, *grid_position(tokens, self.mamba.grid), self.dw)
        return tokens._replace(x=zero_masked(x, tokens.keep_index), residual=None)


class PatchEmbed(nn.Module):
    """Cut an image into overlapping patches with convolutions.

    Args:
        dim: Width of a token.
        patch_size: From one patch to the next, in pixels, even.
        stem_convs: Convolutions 3 x 3 at half the image's size.
        in_chans: Channels of an image.
    """

    def __init__(self, dim: int, *, patch_size: int, stem_convs: int, in_chans: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        first = nn.Conv2d(in_chans, STEM, 7, stride=2, padding=3, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(STEM), nn.ReLU())
        between: list[nn.Module] = []
        for _ in range(stem_convs):
            conv = nn.Conv2d(STEM, STEM, 3, padding=1, bias=False)
            between += [conv, nn.BatchNorm2d(STEM), nn.ReLU()]
        self.convs = nn.Sequential(*between)
        self.projection = nn.Conv2d(STEM, dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        """Embed: (batch, in_chans, height, width) -> (batch, dim, *grid)."""
        maps: Tensor = self.projection(self.convs(self.stem(images)))
        return maps


class Trunk(nn.Module):
    """Everything but the head, under the names of the published weights."""

    def __init__(self, dim: int, patches: int, embed: PatchEmbed, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, patches, dim))
        self.patch_embed = embed
        self.layers = nn.ModuleList(layers)
        self.ln1 = AddLayerNorm(dim, eps=1e-6)


class PlainMamba(Backbone):
    """Classifier whose tokens stay on their grid; without a class token.

    Names, shapes and order of the parameters are those of the published weights.

    Args:
        dim: Width of a token.
        depth: Number of layers, at least 1.
        img_size: Side of an image or (height, width), in pixels.
        patch_size: From one patch to the next, in pixels, even.
        stem_convs: Convolutions 3 x 3 between the first one and the projection.
        dwconv: Convolve what is behind layer 0.
        in_chans: Channels of an image.
        num_classes: Length of the output; 0 returns the feature.
        state: Numbers of state per channel.
        global_pool: What the head reads: "avg", "max", "avgmax" or "", see `reset_classifier`.
        dynamic_img_size: Take images of any size that patches divide, as published, and resize the
            position embedding for them.
        drop_rate: 0; there is no dropout.
        drop_path_rate: Stochastic depth of the last output; rises linearly from 0.
        param_order: "raster" as the published weights need, or "permuted" as in the paper; see
            `fambav.layers.mamba2d`.
        dt_bias_twice: Add the bias of the step size twice, as the published weights need.

    Attributes:
        grid: Patches along height and width.
        length: Tokens at the start.
        reduction: Removes tokens; may be replaced at any time, see `fambav.reduce`.

    Raises:
        ValueError: If patches do not divide the image, or a name or number is not one of those
            above.
    """

    class_token = "none"
    undecayed = ("A_log", "D", "direction_Bs", "pos_embed")
    classifier_name, first_conv = "head.fc", "backbone.patch_embed.stem.0"
    position, final_norm = "backbone.pos_embed", "backbone.ln1"
    dynamic_img_size = True

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        stem_convs: int = 2,
        dwconv: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        state: int = 16,
        global_pool: str | None = None,
        dynamic_img_size: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        param_order: str = "raster",
        dt_bias_twice: bool = True,
    ) -> None:
        super().__init__()
        self.param_order = param_order
        if whole("patch_size", patch_size, least=1) % 2:
            raise ValueError(f"patch_size is {patch_size}, expected an even number of pixels")
        whole("stem_convs", stem_convs, most=MOST_LAYERS)
        flags(dwconv=dwconv)
        if not is_number(drop_rate) or drop_rate != 0:
            raise refusal("drop_rate", drop_rate, "0: there is no dropout")
        self.set_sizes(
            dim,
            depth,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            global_pool=global_pool,
            dynamic_img_size=dynamic_img_size,
        )
        rates = drop_path_rates(drop_path_rate, depth)
        mixer = partial(
            Mamba2D,
            dim,
            grid=self.grid,
            state=state,
            param_order=param_order,
            dt_bias_twice=dt_bias_twice,
        )
        embed = PatchEmbed(dim, patch_size=patch_size, stem_convs=stem_convs, in_chans=in_chans)
        layers = [
            Layer(dim, mixer(), drop_path=rate, dwconv=dwconv and layer == 0)
            for layer, rate in enumerate(rates)
        ]
        self.backbone = Trunk(dim, self.length, embed, layers)
        # Behind a single layer nothing is dropped: the rate of the first output is 0.
        self.drop_path = DropPath(drop_path_rate if depth > 1 else 0.0)
        self.head = nn.Sequential(OrderedDict[str, nn.Module](fc=nn.Identity()))
        self.reset_classifier(num_classes)
        self.reduction = no_reduction(self.info)
        self.describe()

    @property
    def info(self) -> BackboneInfo:
        """What a reduction has to know."""
        return BackboneInfo(
            family="plainmamba",
            stages=(
                Stage(self.depth, self.dim, self.grid, self.length, DIRECTIONS, INTERMEDIATES),
            ),
            unaligned=UNALIGNED if self.param_order == "raster" else None,
            needs_positions=True,
        )

    def flop_parts(self) -> ModelCost:
        """Return the formulas of its parts; weights may be on the meta device."""
        layers = cast(Sequence[Layer], self.layers)
        return ModelCost(
            patches=stem_cost(self.patch_embed, self.img_size),
            layers=tuple(partial(mamba2d_cost, each.mamba, self.dim, each.dw) for each in layers),
            head=Cost.of_products(self.dim * self.num_classes),
            inner=layers[0].mamba.A_log.shape[0],
            published_directions=DIRECTIONS,
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, under the name that they have in other models."""
        return self.backbone.layers

    @property
    def patch_embed(self) -> PatchEmbed:
        """The patch embedding, likewise."""
        return self.backbone.patch_embed

    def embed(self, images: Tensor, *, trace: bool = False) -> Tokens:
        """Cut images into patches and add the position embedding."""
        check_images(images, self.backbone.pos_embed)
        grid, position = self.image_grid(images), self.backbone.pos_embed
        x = rearrange(self.patch_embed(images), "b c h w -> b (h w) c")
        x = x + resize_positions(position, self.grid, grid, class_token=self.class_token)
        return Tokens.start(x, cls_index=(), grid=grid, trace=trace)

    def normed(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the final norm of the residual stream's last sum, and the sum."""
        normed, total = self.backbone.ln1(tokens.x, tokens.residual)
        return normed, total

    def hooks(self, layer: int, tokens: Tokens) -> Hooks:
        """Return what a layer is to do; mixers know one grid and have to be given another."""
        hooks = super().hooks(layer, tokens)
        known = tokens.start_grid in (self.grid, None)
        return hooks if known else hooks._replace(positions=True)

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None
    ) -> None:
        """Keep images of another size for the ones to start from; see `Backbone`."""
        super().set_input_size(img_size, patch_size)
        for layer in cast(Sequence[Layer], self.layers):
            layer.mixer.grid = self.grid


VARIANTS: dict[str, dict[str, Any]] = {
    "plainmamba_l1": {"dim": 192, "depth": 24, "stem_convs": 1, "dwconv": True},
    "plainmamba_l2": {"dim": 384, "depth": 24},
    "plainmamba_l3": {"dim": 448, "depth": 36},
    "plainmamba_micro": {
        "dim": 64,
        "depth": 6,
        "img_size": 32,
        "patch_size": 4,
        "stem_convs": 1,
        "dwconv": True,
    },
}
globals().update(register(PlainMamba, VARIANTS))
