"""What a model is made of, as far as its cost goes."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from fambav.costs.conventions import Cost


class Mixer(Protocol):
    """The mixer of one layer, with whatever else of that layer costs anything."""

    def cost(self, length: int, cells: int) -> Cost:
        """Return the cost for an image.

        Args:
            length: Tokens that it sees, class tokens included.
            cells: Cells of the grid on which its 2D convolutions run.
        """


class Parts(NamedTuple):
    """A model in pieces.

    Attributes:
        patches: Cost of the patch embedding.
        mixers: One for each layer.
        head: Cost of the classifier.
        dim: Width of a token.
        inner: Width inside a mixer.
        scans: Scans in a mixer, one for each direction.
        printed: Scans that papers count.
        length: Tokens before the first layer, class tokens included.
        grid: Height and width of the grid of patches.
    """

    patches: Cost
    mixers: tuple[Mixer, ...]
    head: Cost
    dim: int
    inner: int
    scans: int
    printed: int
    length: int
    grid: tuple[int, int]
