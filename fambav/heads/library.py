"""Decoders of the package segmentation-models-pytorch on the maps of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from torch import Tensor, nn

_PACKAGE = "segmentation_models_pytorch"
STRIDES = [4, 8, 16, 32], [2, 4, 8, 16, 32]  # of the maps of a backbone


class LibraryHead(nn.Module):
    """Logits at the resolution that a decoder of the package ends with.

    Args:
        name: Of the decoder, as the package's `create_model` takes it.
        architecture: Name of the backbone in timm's registry, whose widths the decoder gets.
        strides: Of the backbone's maps.
        num_classes: Logits of a pixel.

    Raises:
        ValueError: If the package is not installed, or maps have other strides than those above.
    """

    def __init__(
        self, name: str, architecture: str, *, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        if find_spec(_PACKAGE) is None:
            raise ValueError(
                f"head is {name!r}, expected an installed one: segmentation-models-pytorch has it;"
                ' pip install "fambav[dense]"'
            )
        if list(strides) not in STRIDES:
            raise ValueError(
                f"head is {name!r}, expected upernet or fcn on {architecture}, whose maps have"
                f" strides of {', '.join(map(str, strides))} pixels, not {STRIDES[0]}"
            )
        import segmentation_models_pytorch as package

        whole = package.create_model(  # its encoder, of which there is a better one, goes
            name, f"tu-{architecture}", encoder_weights=None, classes=num_classes
        )
        self.num_classes = num_classes
        self.decoder = whole.decoder
        self.conv_seg = whole.segmentation_head[0]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits, (batch, num_classes, height, width).

        Args:
            maps: (batch, channels, height, width), the finest one first.
        """
        batch, _, height, width = maps[0].shape
        # The package's encoders also give the image, and a map of stride 2 where there is none:
        # here both have no channels.
        more = (4, 2) if len(maps) == len(STRIDES[0]) else (2,)
        finer = [maps[0].new_empty(batch, 0, n * height, n * width) for n in more]
        logits: Tensor = self.conv_seg(self.decoder([*finer, *maps]))
        return logits
