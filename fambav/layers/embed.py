"""From an image to a sequence: patches, class tokens, and the resizing of position embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fambav.arguments import LARGEST, is_whole, known_name, refusal, whole
from fambav.ops.cross_scan import select_rows
from fambav.ops.dispatch import autocasts
from fambav.ops.match import others
from fambav.registry import CLASS_TOKENS


def pair(size: int | Sequence[int], *, name: str) -> tuple[int, int]:
    """Return a size as (height, width).

    Raises:
        ValueError: If size is neither a positive number nor two of them; `name` is in the message.
    """
    both = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(both) != 2 or not all(is_whole(side) and 0 < side <= LARGEST for side in both):
        expected = f"a whole number of 1 to {LARGEST} or a pair of them, (height, width)"
        raise refusal(name, size, expected)
    return both[0], both[1]


def patch_grid(
    img_size: tuple[int, int], *, patch_size: int, stride: int, name: str = "img_size"
) -> tuple[int, int]:
    """Count the patches of an image along each side.

    Args:
        img_size: Height and width, in pixels.
        patch_size: Side of a patch, in pixels.
        stride: From one patch to the next, in pixels.
        name: Of the size, for a refusal.

    Returns:
        (side - patch_size) / stride + 1 for height and width.

    Raises:
        ValueError: If that is not a positive whole number.
    """
    whole("patch_size", patch_size, least=1)
    whole("stride", stride, least=1)
    for side in img_size:
        steps, rest = divmod(side - patch_size, stride)
        if steps < 0 or rest:
            fit = patch_size + stride * max(steps, 0)
            raise ValueError(
                f"{name} is {side}, expected a size that patches of {patch_size} every {stride}"
                f" pixels divide, but ({side} - {patch_size}) / {stride} + 1 ="
                f" {(side - patch_size) / stride + 1:.4g} patches;"
                f" the next sizes that fit are {fit} and {fit + stride}"
            )
    height, width = ((side - patch_size) // stride + 1 for side in img_size)
    return height, width


def cls_index_of(class_token: str, patches: int) -> tuple[int, ...]:
    """Return where class tokens are in the sequence that the model starts with, ascending.

    Args:
        class_token: "middle" after half of the patches, "head" before all, "double" before and
            after, or "none".
        patches: Number of patches.

    Raises:
        ValueError: If class_token is none of these.
    """
    return {
        "middle": (patches // 2,),
        "head": (0,),
        "double": (0, patches + 1),
        "none": (),
    }[known_name("class_token", class_token, CLASS_TOKENS)]


def insert(x: Tensor, extra: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """Put rows into a sequence: (batch, length, dim) -> (batch, length + k, dim).

    Args:
        x: The sequence.
        extra: k rows, each (1, 1, dim).
        indices: Of the rows in the result, k ascending numbers.
    """
    pieces, start = [], 0
    for before, (row, index) in enumerate(zip(extra, indices, strict=True)):
        pieces += [x[:, start : index - before], row.expand(x.shape[0], -1, -1)]
        start = index - before
    return torch.cat([*pieces, x[:, start:]], dim=1)


def resize_grid(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a grid of vectors bicubically, in x's dtype.

    Args:
        x: Vectors row by row, (1, old height * old width, dim).
        old: Height and width of the grid.
        new: Height and width wanted.
    """
    maps = rearrange(x.float(), "n (h w) c -> n c h w", h=old[0], w=old[1])
    maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False)
    return rearrange(maps, "n c h w -> n (h w) c").to(x.dtype)


def check_images(images: Any, weight: Tensor) -> None:
    """Refuse what is no batch of images in the dtype of a model's weights.

    Args:
        images: (batch, channels, height, width); autocast takes float16, bfloat16 and float32.
        weight: One of the weights.

    Raises:
        ValueError: If it is another.
    """
    if not isinstance(images, Tensor):
        raise refusal("images", images, "a tensor (batch, channels, height, width)")
    castable = images.is_floating_point() and images.dtype != torch.float64
    if images.dtype != weight.dtype and not (castable and autocasts(images)):
        raise ValueError(f"images are {images.dtype}, expected {weight.dtype}")
    if images.ndim != 4:
        shape = tuple(images.shape)
        raise ValueError(f"images are {shape}, expected (batch, channels, height, width)")


def resize_positions(
    pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], *, class_token: str
) -> Tensor:
    """Resize a position embedding bicubically to another grid of patches.

    Args:
        pos_embed: The rows of patches and class tokens, (1, length, dim).
        old: Patches along height and width that it is for.
        new: Those wanted.
        class_token: Where class tokens are, as for `cls_index_of`; their rows stay as they are.

    Returns:
        (1, new length, dim); pos_embed itself if both grids are the same.
    """
    if old == new:
        return pos_embed
    before, after = (cls_index_of(class_token, grid[0] * grid[1]) for grid in (old, new))
    index = torch.tensor([before], dtype=torch.int64, device=pos_embed.device)  # (1, k)
    class_rows = select_rows(pos_embed, index).split(1, dim=1) if before else ()
    raster = resize_grid(select_rows(pos_embed, others(index, pos_embed.shape[1])), old, new)
    return insert(raster, class_rows, after)


class PatchEmbed(nn.Module):
    """Cut an image into patches and map each to a vector, row by row.

    Args:
        dim: Width of a token.
        patch_size: Side of a patch, in pixels.
        stride: From one patch to the next, in pixels; patches overlap if it is below patch_size.
        in_chans: Channels of an image.
    """

    def __init__(self, dim: int, *, patch_size: int, stride: int, in_chans: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=stride)
        # The published models draw this from a normal that is corrected for a cut at two standard
        # deviations, and do not cut it.
        nn.init.normal_(self.proj.weight, std=(in_chans * patch_size**2) ** -0.5 / 0.8796)
        nn.init.zeros_(cast(Tensor, self.proj.bias))

    def forward(self, images: Tensor) -> Tensor:
        """Embed: (batch, in_chans, height, width) -> (batch, patches, dim)."""
        patches: Tensor = rearrange(self.proj(images), "b c h w -> b (h w) c")
        return patches
