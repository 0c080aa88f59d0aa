"""A classifier of layers of one width over the same tokens, as timm knows one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fambav.arguments import MOST_LAYERS, refusal, whole
from fambav.layers import BackboneInfo
from fambav.layers.block import Add
from fambav.layers.embed import cls_index_of, pair, patch_grid, resize_positions
from fambav.models.entry import chosen_layers, data_config
from fambav.models.timm_model import TimmModel
from fambav.models.weights import resize_pos_embed
from fambav.reduction import Reduction


class Isotropic(TimmModel):
    """Layers can be cut off, and the input size changed, with the position embedding.

    Attributes:
        dim: Width of a token.
        depth: Number of layers.
        grid: Patches along height and width.
        length: Tokens at the start, class tokens included.
        layers: Have `grad_checkpointing`.
        reduction: Removes tokens; may be replaced at any time, see `fambav.reduce`.
        position: Name of the position embedding.
    """

    position: ClassVar[str] = "pos_embed"
    final_norm: ClassVar[str] = "norm_f"
    dim: int
    depth: int
    grid: tuple[int, int]
    length: int
    layers: Any
    reduction: Reduction
    patch_size: int
    stride: int

    @property
    def blocks(self) -> list[nn.Module]:
        """All layers, in the order of depth."""
        return list(self.layers)

    @classmethod
    def pool_size(
        cls,
        img_size: tuple[int, int],
        *,
        patch_size: int = 16,
        stride: int | None = None,
        **config: Any,
    ) -> tuple[int, int]:
        """Return the height and width of the grid of patches; see `TimmModel`."""
        del config
        return patch_grid(img_size, patch_size=patch_size, stride=stride or patch_size)

    def set_sizes(
        self,
        dim: int,
        depth: int,
        *,
        img_size: int | Sequence[int],
        patch_size: int,
        stride: int | None = None,
        in_chans: int,
        global_pool: str | None,
        dynamic_img_size: bool,
    ) -> None:
        """Set what constructors of all models are given; `class_token` is set before.

        Raises:
            ValueError: If one is not as the constructor says.
        """
        whole("dim", dim, least=1)
        whole("depth", depth, least=1, most=MOST_LAYERS)
        whole("in_chans", in_chans, least=1)
        self.dim = self.embed_dim = self.num_features = self.head_hidden_size = dim
        self.depth, self.in_chans, self.patch_size = depth, in_chans, patch_size
        self.stride = patch_size if stride is None else stride
        self.lay_out(pair(img_size, name="img_size"))
        self.global_pool = self._pooling(global_pool)
        self.dynamic_img_size = dynamic_img_size

    def lay_out(self, img_size: tuple[int, int]) -> None:
        """Set the grid of patches, and where class tokens are, for images of a size."""
        self.grid = patch_grid(img_size, patch_size=self.patch_size, stride=self.stride)
        self.img_size = img_size
        patches = self.grid[0] * self.grid[1]
        self.cls_index = cls_index_of(self.class_token, patches)
        self.length = patches + len(self.cls_index)

    def image_grid(self, images: Tensor) -> tuple[int, int]:
        """Return the patches along height and width of images that this model takes.

        Raises:
            ValueError: If they are not (batch, in_chans, *img_size), or, with `dynamic_img_size`,
                have other channels or a size that patches do not divide.
        """
        shape, patch = tuple(images.shape), dict(patch_size=self.patch_size, stride=self.stride)
        if shape[1:] == (self.in_chans, *self.img_size):
            return self.grid
        if self.dynamic_img_size and len(shape) == 4 and shape[1] == self.in_chans:
            return patch_grid((shape[2], shape[3]), **patch, name="side of an image")
        sides = ("height", "width") if self.dynamic_img_size else self.img_size
        raise ValueError(
            f"images are {shape}, expected (batch, {self.in_chans}, {sides[0]}, {sides[1]})"
        )

    def info_on(self, grid: tuple[int, int]) -> BackboneInfo:
        """Return the model in figures on images of another grid of patches."""
        own, patches = self.info, grid[0] * grid[1]
        cls_index = cls_index_of(self.class_token, patches)
        stage = own.stage._replace(grid=grid, tokens=patches + len(cls_index))
        return own._replace(stages=(stage,), cls_index=cls_index)

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None
    ) -> None:
        """Build the position embedding for images of another size, with which it is resized.

        A reduction's schedule is read anew for their tokens, see `Reduction.resized`.

        Args:
            img_size: Side of an image or (height, width), in pixels.
            patch_size: No other than the model's.

        Raises:
            ValueError: If patches do not divide the images or would have another size, or the
                schedule does not fit their tokens; nothing is changed then.
        """
        if patch_size not in (None, self.patch_size):
            raise refusal("patch_size", patch_size, str(self.patch_size))
        size = self.img_size if img_size is None else pair(img_size, name="img_size")
        if size == self.img_size:
            return
        grid = patch_grid(size, patch_size=self.patch_size, stride=self.stride)
        reduction = self.reduction.resized(self.info_on(grid))
        old, place = self.get_parameter(self.position), self.class_token
        new = resize_positions(old.detach(), self.grid, grid, class_token=place)
        owner, _, name = self.position.rpartition(".")
        resized = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(self.get_submodule(owner), name, resized)
        self.lay_out(size)
        self.reduction = reduction
        self.pretrained_cfg.update(input_size=(self.in_chans, *size), pool_size=self.grid)
        self._traits = {**getattr(self, "_traits", {}), "img_size": size}  # timm's own record

    def resized(
        self, weights: dict[str, Tensor], grid: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        """Resize position embeddings bicubically; see `TimmModel`.

        Rows of class tokens are taken out of the grid where they are and put back where this model
        has them.
        """
        name = self.position
        own, shape = self.get_parameter(name).shape, weights[name].shape
        if len(shape) == 3 and shape[::2] == own[::2]:
            weights = {**weights, name: resize_pos_embed(weights[name], self, grid)}
        return weights

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

    def describe(self) -> None:
        """Describe what images are read and what the layers return, in timm's terms."""
        inside = self.position.rpartition("pos_embed")[0]
        self.feature_info = [
            {"num_chs": self.dim, "reduction": self.stride, "module": f"{inside}layers.{layer}"}
            for layer in range(self.depth)
        ]
        self.pretrained_cfg = self.default_cfg = data_config(
            type(self),
            img_size=self.img_size,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            patch_size=self.patch_size,
            stride=self.stride,
            dynamic_img_size=self.dynamic_img_size,
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

    def set_grad_checkpointing(
        self,
        enable: bool = True,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again."""
        for block in self.layers:
            block.grad_checkpointing = enable
