"""Vision Mamba (Vim): patches in a row, scanned both ways, and fused on the way if wanted.

    image -> patches and class token -> depth x (add, norm, fuse, mix) -> norm -> head

Source: Zhu et al., "Vision Mamba", arXiv:2401.09417; token fusion between its layers: Shen et al.,
"Famba-V", arXiv:2409.09808, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fambav.arguments import probability
from fambav.layers.block import AddNorm, Block
from fambav.layers.drop import Dropout, DropPath
from fambav.layers.embed import PatchEmbed, check_images, cls_index_of, insert, resize_positions
from fambav.layers.info import BackboneInfo, Stage
from fambav.layers.mamba import Mamba
from fambav.layers.tokens import INTERMEDIATES, Tokens
from fambav.models.backbone import Backbone, drop_path_rates
from fambav.models.entry import register
from fambav.models.flops import Cost, ModelCost, mamba_cost, stem_cost
from fambav.reduction import fused


class Vim(Backbone):
    """Bidirectional Mamba classifier.

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
            which a fused token counts once for each patch in it.
        bimamba_type: Mixer, "v2", "v1" or "none"; see `fambav.layers.mamba`.
        divide_out: Halve the sum of both directions; v2 only.
        state: Numbers of state per channel.
        global_pool: What the head reads: "token", the default where there is one, "avg", "max",
            "avgmax" or "", see `reset_classifier`.
        dynamic_img_size: Take images of any size that patches divide, and resize the position
            embedding for them.
        drop_rate: Dropout after the position embedding, at least 0 and less than 1.
        drop_path_rate: Stochastic depth of the last output; rises linearly from 0.
        legacy_init: Start the backward dt bias at the published zero.
        fusion_strategy, fusion_layer, fusion_token, fusion_method, fusion_plan: See `fuse`.

    Attributes:
        grid: Patches along height and width.
        cls_index: Where the class tokens are at the start.
        length: Tokens at the start, class tokens included.
        reduction: Removes tokens; may be replaced at any time, see `fambav.reduce`.

    Raises:
        ValueError: If patches do not divide the image, fusion cannot be done or would do nothing,
            or a name or number is not one of those above.
    """

    undecayed = (
        *("A_log", "A_b_log", "D", "D_b"),
        *("pos_embed", "cls_token", "cls_token_head", "cls_token_tail"),
    )

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
        global_pool: str | None = None,
        dynamic_img_size: bool = False,
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
        self.class_token, self.bimamba_type = class_token, bimamba_type
        self.set_sizes(
            dim,
            depth,
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            global_pool=global_pool,
            dynamic_img_size=dynamic_img_size,
        )
        self.fuse(fusion_strategy, fusion_layer, fusion_token, fusion_method, fusion_plan)

        self.class_names = _class_names(class_token)
        for name in self.class_names:
            self.register_parameter(name, nn.Parameter(0.02 * torch.randn(1, 1, dim)))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.length, dim))
        self.patch_embed = PatchEmbed(
            dim, patch_size=patch_size, stride=self.stride, in_chans=in_chans
        )
        self.pos_drop = Dropout(probability("drop_rate", drop_rate))
        self.reset_classifier(num_classes)
        mixer = partial(Mamba, dim, bimamba_type=bimamba_type, divide_out=divide_out, state=state)
        rates = drop_path_rates(drop_path_rate, depth)
        self.layers = nn.ModuleList(
            Block(dim, mixer(depth=depth, legacy_init=legacy_init), drop_path=rate)
            for rate in rates
        )
        self.name_mixers()
        self.norm_f = AddNorm(dim)
        self.drop_path = DropPath(drop_path_rate)
        self.describe()

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
            strategy: Layers that fuse, as in `fambav.reduction.from_fusion`.
            layer: Likewise.
            token: Likewise.
            method: How, "famba-v" or "ordered".
            plan: As in `from_fusion`.

        Raises:
            ValueError: If that cannot be done or would do nothing.
        """
        self.reduction = fused(
            self.info, strategy, layer=layer, token=token, method=method, plan=plan
        )

    @property
    def info(self) -> BackboneInfo:
        """What a reduction has to know."""
        directions = 1 if self.bimamba_type == "none" else 2
        return BackboneInfo(
            family="vim",
            stages=(
                Stage(self.depth, self.dim, self.grid, self.length, directions, INTERMEDIATES),
            ),
            cls_index=self.cls_index,
        )

    def flop_parts(self) -> ModelCost:
        """Return the formulas of its parts; weights may be on the meta device."""
        mixers = [layer.mixer for layer in self.layers]
        return ModelCost(
            patches=stem_cost(self.patch_embed, self.img_size),
            layers=tuple(partial(mamba_cost, mixer, self.dim) for mixer in mixers),
            head=Cost.of_products(self.dim * self.num_classes),
            inner=mixers[0].A_log.shape[0],
            published_directions=1,
        )

    def embed(self, images: Tensor, *, trace: bool = False) -> Tokens:
        """Cut images into patches, insert the class tokens and add the position embedding."""
        check_images(images, self.pos_embed)
        grid, place = self.image_grid(images), self.class_token
        cls_index = cls_index_of(place, grid[0] * grid[1])
        class_tokens = [getattr(self, name) for name in self.class_names]
        x = insert(self.patch_embed(images), class_tokens, cls_index)
        x = self.pos_drop(x + resize_positions(self.pos_embed, self.grid, grid, class_token=place))
        return Tokens.start(x, cls_index=cls_index, grid=grid, trace=trace)

    def normed(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the final norm of the residual stream's last sum, and the sum."""
        normed, total = self.norm_f(tokens.x, tokens.residual)
        return normed, total


def _class_names(class_token: str) -> tuple[str, ...]:
    """Names of the class tokens' parameters, in the order of the sequence."""
    if class_token == "none":
        return ()
    return ("cls_token_head", "cls_token_tail") if class_token == "double" else ("cls_token",)


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
globals().update(register(Vim, VARIANTS))
