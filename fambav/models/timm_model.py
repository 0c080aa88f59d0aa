"""What timm and training loops ask of a model, beside its forward passes.

Its classifier can be replaced, its input size changed, its layers cut off; it describes what it
reads and returns, and which parameters belong to which depth.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fambav.arguments import MOST_LAYERS, refusal, whole
from fambav.layers import BackboneInfo
from fambav.layers.block import Add
from fambav.layers.embed import cls_index_of, pair, patch_grid, resize_positions
from fambav.models.entry import chosen_layers, data_config
from fambav.models.weights import adapt, official, published_class_token
from fambav.reduction import Reduction
from fambav.registry import FAMILIES


class TimmModel(nn.Module):
    """A classifier of equal layers as timm knows one.

    Attributes:
        dim: Width of a token.
        depth: Number of layers.
        img_size: Height and width of an image, in pixels.
        grid: Patches along height and width.
        length: Tokens at the start, class tokens included.
        reduction: Removes tokens; may be replaced at any time, see `fambav.reduce`.
        undecayed: Last names of the parameters that weight decay would pull away from what they
            mean.
        classifier, first_conv, final_norm, position: Names of the modules that give the output,
            read the image and normalise the sum of all layers, and of the position embedding.
        dynamic_img_size: Whether images of any size that patches divide are taken, for which the
            position embedding is resized; `img_size` is the one that it is learnt for.
        global_pool: What the head reads, see `reset_classifier`.
        feature_info: Channels and stride of each layer, in timm's words.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()
    classifier: ClassVar[str] = "head"
    first_conv: ClassVar[str] = "patch_embed.proj"
    position: ClassVar[str] = "pos_embed"
    final_norm: ClassVar[str] = "norm_f"
    dynamic_img_size: bool = False
    dim: int
    depth: int
    img_size: tuple[int, int]
    grid: tuple[int, int]
    length: int
    layers: Any
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
        """The model in figures."""

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

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one.

        Args:
            num_classes: Its outputs; 0 for none.
            global_pool: "token", the class tokens' mean; "avg", the mean over patches; "max",
                their largest value in each channel; "avgmax", the mean of both; "" for every
                token by itself; None as before.  All of normalised tokens.

        Raises:
            ValueError: If num_classes is negative or no whole number, or there is no such pooling.
        """
        pool = self.global_pool if global_pool is None else self._pooling(global_pool)
        head = self._new_head(num_classes, self.get_parameter(self.position))
        self.global_pool = pool
        owner, _, name = self.classifier.rpartition(".")
        setattr(self.get_submodule(owner), name, head)

    def _pooling(self, name: str | None) -> str:
        """Return the name of a pooling that this model has; None for its own."""
        known = ("token",) * bool(self.cls_index) + ("avg", "max", "avgmax", "")
        if name is None:
            return known[0]
        if not isinstance(name, str) or name not in known:
            raise refusal(
                "global_pool", name, f"one of {', '.join(map(repr, known))} of this model"
            )
        return name

    def _new_head(self, num_classes: int, like: Tensor) -> nn.Module:
        """Return a classifier of `num_classes` outputs, 0 for none, beside `like`.

        Raises:
            ValueError: If num_classes is negative or no whole number.
        """
        self.num_classes = whole("num_classes", num_classes)
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.dim, num_classes)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        return head.to(like).train(self.training)

    def get_classifier(self) -> nn.Module:
        """Return the head's linear map."""
        return self.get_submodule(self.classifier)

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
            patch_size=self.patch_size,
            stride=self.stride,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
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
            class_token: Where the class token was in training; None reads it from the file.
            grid: As for `adapt`.
            head: As for `adapt`.

        Returns:
            Weights that load strictly into this model.

        Raises:
            ValueError: As `official` and `adapt`.
        """
        own, place = self.state_dict().keys(), None
        weights = official(payload, ema=ema, own=own, head=head)
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
