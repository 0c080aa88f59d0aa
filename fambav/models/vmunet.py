"""VM-UNet: vanilla VMamba in the shape of a U, for segmentation.

Source: Ruan et al., "VM-UNet", arXiv:2402.02491.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from fambav.layers.hierarchy import Blocks, MapBlock
from fambav.layers.ss2d import SS2D
from fambav.models.entry import register
from fambav.models.flops import Cost, map_cost, ss2d_cost, total
from fambav.models.segmenter import SIZES, Segmenter, as_published
from fambav.ops.scan_paths import CROSS

STATE = 16  # numbers of state per channel


class VSSBlock(MapBlock):
    """A gated selective scan of the map under the names of VMamba's first code.

    Args:
        dim: Width of a cell.
        paths: Of `fambav.ops.scan_paths.PATHS`.
        drop_path: Probability that a sample skips the branch.
    """

    def __init__(self, dim: int, *, paths: tuple[str, ...] = CROSS, drop_path: float = 0.0) -> None:
        super().__init__(drop_path)
        # Names and order are those of the published weights.
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = SS2D(
            dim, state=STATE, expand=2.0, gated=True, conv_bias=True, paths=paths
        )
        for name in ("A_logs", "Ds"):  # which are behind the step sizes there
            parameter = self.self_attention.get_parameter(name)
            delattr(self.self_attention, name)
            self.self_attention.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to a map, (batch, height, width, dim)."""
        return self.residual(x, self._mix)

    def _mix(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.self_attention(self.ln_1(x))
        return mixed


def vss_cost(block: VSSBlock, grid: tuple[int, int]) -> Cost:
    """Return the cost of a block on a map of a height and width, without literature's."""
    return total(map_cost(block.ln_1, grid), ss2d_cost(block.self_attention, grid))


class VMUNet(Segmenter):
    """Sums the maps of the encoder and of the decoder at all levels but the finest.

    Names, shapes and order of the parameters are those of the published weights.  Those of one
    class give its logit here; the authors' code returns its sigmoid.

    Args:
        arguments: As of `Segmenter`.
    """

    family = "vmunet"
    body = "vmunet"
    classifier_name, first_conv = "vmunet.final_conv", "vmunet.patch_embed.proj"

    @property
    def patch_embed(self) -> nn.Module:  # type: ignore[override]  # it is inside the body
        """What makes the first map of images."""
        return self.get_submodule("vmunet.patch_embed")

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The stages of the encoder."""
        return cast(nn.ModuleList, self.get_submodule("vmunet.layers"))

    def make_blocks(self, dim: int, rates: Sequence[float]) -> Blocks:
        """Return the blocks of a stage; see `Segmenter`."""
        return Blocks([VSSBlock(dim, drop_path=rate) for rate in rates])

    def fuse(self, level: int, skip: Tensor, x: Tensor) -> Tensor:
        """Return the sum of both maps, or, at the finest, the decoder's."""
        return x + skip if level else x

    def block_cost(self, block: nn.Module, grid: tuple[int, int]) -> Cost:
        """Return the cost of a block on a map of a height and width."""
        return as_published(vss_cost(cast(VSSBlock, block), grid), (block, grid))


_PUBLISHED = {**SIZES, "dims": (96, 192, 384, 768)}
VARIANTS: dict[str, dict[str, Any]] = {
    "vmunet": _PUBLISHED,
    "vmunet_deep": {**_PUBLISHED, "depths": (2, 2, 9, 2), "depths_up": (2, 9, 2, 2)},
    "vmunet_nano": {**SIZES, "dims": (16, 32, 64, 128), "img_size": 32},
}
globals().update(register(VMUNet, VARIANTS))
