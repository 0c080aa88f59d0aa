"""What timm and training loops ask of a model, beside its forward passes.

Its classifier can be replaced; it describes what it reads and returns, fits weights to itself, and
names the parameters that weight decay spares.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fambav.arguments import refusal, whole
from fambav.layers import BackboneInfo
from fambav.models.flops import HierarchicalCost, ModelCost
from fambav.models.model import Model
from fambav.models.weights import adapt, official, published_class_token
from fambav.reduction import Reduction, StagedReduction
from fambav.registry import FAMILIES


class TimmModel(Model):
    """A classifier as timm knows one.

    Attributes:
        img_size: Height and width of an image, in pixels.
        in_chans: Channels of an image.
        num_features: Width of what the head reads.
        global_pool: What the head reads, see `reset_classifier`.
        class_token: Where its class tokens are, see `Vim`; "none" without.
        cls_index: Their indices in the sequence that the model starts with.
        first_conv, final_norm: Names of the modules that read the image and normalise what the last
            layer gives.
        dynamic_img_size: Whether images of other sizes are taken too; `img_size` is the one that
            FLOPs are counted for, and position embeddings learnt.
        feature_count: How many of its last feature maps `features_only` returns by default.
        feature_info: Channels and stride of each feature map, in timm's words.
    """

    first_conv: ClassVar[str] = "patch_embed.proj"
    final_norm: ClassVar[str] = "norm"
    dynamic_img_size: bool = False
    feature_count: ClassVar[int] = 3
    img_size: tuple[int, int]
    in_chans: int
    num_features: int
    global_pool: str
    class_token: str = "none"
    cls_index: tuple[int, ...] = ()
    feature_info: list[dict[str, Any]]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a reduction is in training or evaluation as the model is."""
        if isinstance(value, Reduction | StagedReduction):
            value.train(self.training)
        super().__setattr__(name, value)

    @property
    @abstractmethod
    def info(self) -> BackboneInfo:
        """The model in figures."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """All layers, in the order of depth."""

    @abstractmethod
    def flop_parts(self) -> ModelCost | HierarchicalCost:
        """Return what an image costs each part; weights may be on the meta device."""

    @classmethod
    @abstractmethod
    def pool_size(cls, img_size: tuple[int, int], **config: Any) -> tuple[int, int]:
        """Return the height and width of the map that is pooled.

        Args:
            img_size: Height and width of an image, in pixels.
            config: Other arguments of the constructor.
        """

    @abstractmethod
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None
    ) -> None:
        """Take images of another size from now on."""

    @abstractmethod
    def set_grad_checkpointing(
        self,
        enable: bool = True,  # noqa: FBT001, FBT002  the signature is timm's
    ) -> None:
        """Compute the inside of layers again in the backward pass instead of keeping it."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one.

        Args:
            num_classes: Its outputs; 0 for none.
            global_pool: One of `poolings`: "token", the class tokens' mean; "avg", the mean over
                patches; "max", their largest value in each channel; "avgmax", the mean of both; ""
                for every token by itself; None as before.  All of normalised tokens.

        Raises:
            ValueError: If num_classes is negative or no whole number, or there is no such pooling.
        """
        pool = self.global_pool if global_pool is None else self._pooling(global_pool)
        head = self._new_head(num_classes, next(self.parameters()))
        self.global_pool = pool
        owner, _, name = self.classifier_name.rpartition(".")
        setattr(self.get_submodule(owner), name, head)

    @property
    def poolings(self) -> tuple[str, ...]:
        """Names of poolings, the model's own first."""
        return ("token",) * bool(self.cls_index) + ("avg", "max", "avgmax", "")

    def _pooling(self, name: str | None) -> str:
        """Return the name of a pooling that this model has; None for its own."""
        known = self.poolings
        if name is None:
            return known[0]
        if not isinstance(name, str) or name not in known:
            able = ", ".join(map(repr, known))
            raise refusal("global_pool", name, f"one of {able} of this model")
        return name

    def _new_head(self, num_classes: int, like: Tensor) -> nn.Module:
        """Return a classifier of `num_classes` outputs, 0 for none, beside `like`.

        Raises:
            ValueError: If num_classes is negative or no whole number.
        """
        self.num_classes = whole("num_classes", num_classes)
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.num_features, num_classes)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        return head.to(like).train(self.training)

    def pick(
        self,
        payload: Mapping[str, Any],
        *,
        ema: bool = False,
        head: Literal["strict", "drop"] = "strict",
    ) -> dict[str, Tensor]:
        """Pick the weights out of what a file holds, ours or a published one, under our names.

        Args:
            payload: As for `official`.
            ema: Take the moving average.
            head: As for `official`.

        Raises:
            ValueError: As `official`.
        """
        weights = self.renamed(official(payload, ema=ema))
        return official(weights, own=self.state_dict().keys(), head=head)

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of other codes of the same model under the names that they have here.

        Args:
            weights: With any prefix.

        Raises:
            ValueError: If they are of another form of the model.
        """
        return weights

    def resized(
        self, weights: dict[str, Tensor], grid: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        """Return weights of all names of this model, fitted to its image size.

        Args:
            weights: Of this model at some image size.
            grid: Patches along height and width in training, if that is known.

        Raises:
            ValueError: If the grid has to be given.
        """
        del grid
        return weights

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
            ValueError: As `pick` and `adapt`.
        """
        weights, place = self.pick(payload, ema=ema, head=head), None
        if "class_token" in FAMILIES[self.info.family].arguments:
            place = class_token or published_class_token(payload)
        return adapt(weights, self, class_token=place, grid=grid, head=head)


def pool_patches(patches: Tensor, mean: Tensor, pooling: str) -> Tensor:
    """Pool rows of patches, (batch, length, dim), whose mean is known: "avg", "max" or "avgmax"."""
    if pooling == "avg":
        return mean
    largest = patches.amax(dim=1)  # (batch, dim)
    return largest if pooling == "max" else (largest + mean) / 2
