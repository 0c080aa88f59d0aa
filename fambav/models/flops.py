"""What a model's parts cost, by arithmetic on sizes alone, in three conventions side by side.

A multiply-add of a matrix product or of a convolution counts 1 in all three.

literature        what papers print.  A scan adds 9 * length * inner * state, and its skip and gate
                  2 * length * inner.  Vim's papers count one of its two directions (convolution,
                  projections and scan); PlainMamba's count all four scans, and no gate.
all-directions    the same terms for every direction that is computed.
multiply-adds     products and convolutions of all directions, and nothing else: no scan.

Norms, activations, sums of streams and position embeddings count nowhere, nor do biases.  What a
reduction adds is in `fambav.costs.reduction`.

Source: the scan's term is the community's, state-spaces/mamba issue 110; the other terms are those
that reproduce the figures of Shi et al., arXiv:2412.12496, and Yang et al., arXiv:2403.17695.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

from torch import nn

from fambav.layers.mamba import Mamba
from fambav.layers.mamba2d import DIRECTIONS, Mamba2D

CONVENTIONS: dict[str, str] = {
    "literature": "as papers print it: multiply-adds and scan terms, one direction of Vim's two",
    "all-directions": "multiply-adds and scan terms of every direction",
    "multiply-adds": "multiply-adds of products and convolutions, no scan terms",
}
SCAN = 9  # for each number of state and token, as papers count


class Cost(NamedTuple):
    """Operations for one image; `total` adds them.

    Attributes:
        literature: As papers print them.
        all_directions: The same terms for every direction.
        multiply_adds: Products and convolutions alone.
    """

    literature: int = 0
    all_directions: int = 0
    multiply_adds: int = 0

    @classmethod
    def plain(cls, products: int) -> Cost:
        """Return the cost of multiply-adds that all conventions count alike."""
        return cls(products, products, products)

    def json(self) -> dict[str, int]:
        """Return the costs under the conventions' names."""
        return dict(zip(CONVENTIONS, self, strict=True))


FREE = Cost()


def total(*costs: Cost) -> Cost:
    """Add costs, convention by convention."""
    return Cost(*map(sum, zip(*costs, strict=True))) if costs else FREE


class Mixer(Protocol):
    """The mixer of one layer, with whatever else of that layer costs anything."""

    def cost(self, length: int, cells: int) -> Cost:
        """Return the cost for an image.

        Args:
            length: Tokens that it sees, class tokens included.
            cells: Cells of the grid on which its 2D convolutions run.
        """


class Parts(NamedTuple):
    """What an image costs a model, beside the sizes in its `info`.

    Attributes:
        patches: Cost of the patch embedding.
        mixers: One for each layer.
        head: Cost of the classifier.
        inner: Width inside a mixer.
        printed: Scans of a mixer that papers count.
    """

    patches: Cost
    mixers: tuple[Mixer, ...]
    head: Cost
    inner: int
    printed: int


class VimMixer(NamedTuple):
    """The sizes of a mixer of Vim: two projections; convolution, projections and scan each way.

    Attributes:
        dim: Width of a token.
        inner: Width inside.
        state: Numbers of state per channel.
        rank: Width of what the step sizes are made from.
        kernel: Length of the convolution.
        branches: Convolutions with their projections, 2 if each direction has its own.
        scans: Directions that are scanned, 1 or 2.
    """

    dim: int
    inner: int
    state: int
    rank: int
    kernel: int
    branches: int
    scans: int

    def cost(self, length: int, cells: int) -> Cost:
        """Return the cost of `length` tokens.

        Papers count the convolution at every place of the padded sequence, `kernel - 1` more than
        there are tokens.
        """
        del cells  # its convolution follows the sequence
        around = 3 * length * self.dim * self.inner  # in_proj to twice the inner width, out_proj
        widths = self.rank + 2 * self.state
        projected = length * self.inner * (widths + self.rank)
        convolved, padded = (
            n * self.inner * self.kernel for n in (length, length + self.kernel - 1)
        )
        scanned = SCAN * length * self.inner * self.state + 2 * length * self.inner
        products = around + self.branches * (convolved + projected)
        return Cost(
            literature=around + padded + projected + scanned,
            all_directions=products + self.scans * scanned,
            multiply_adds=products,
        )

    @classmethod
    def of(cls, dim: int, mixer: Mamba) -> VimMixer:
        """Read the sizes off a mixer; weights may be on the meta device."""
        rank, state, _ = mixer.splits
        conv: nn.Conv1d = mixer.conv1d
        return cls(
            dim=dim,
            inner=conv.in_channels,
            state=state,
            rank=rank,
            kernel=conv.kernel_size[0],
            branches=2 if mixer.bimamba_type == "v2" else 1,
            scans=1 if mixer.bimamba_type == "none" else 2,
        )


class PlainMixer(NamedTuple):
    """The sizes of a mixer of PlainMamba, whose scans share the projections.

    Papers count all scans, with 9 * length * inner * state and length * inner each.

    Attributes:
        dim: Width of a token.
        inner: Width inside.
        state: Numbers of state per channel.
        rank: Width of what the step sizes are made from.
        kernel: Side of the convolution.
        behind: Side of a further convolution of each channel, behind the layer; 0 for none.
    """

    dim: int
    inner: int
    state: int
    rank: int
    kernel: int
    behind: int

    def cost(self, length: int, cells: int) -> Cost:
        """Return the cost of `length` tokens whose convolutions run on `cells` cells."""
        around = 3 * length * self.dim * self.inner
        projected = length * self.inner * (2 * self.rank + 2 * self.state)
        convolved = cells * (self.kernel**2 * self.inner + self.behind**2 * self.dim)
        scanned = SCAN * length * self.inner * self.state + length * self.inner
        products = around + projected + convolved
        whole = products + DIRECTIONS * scanned
        return Cost(literature=whole, all_directions=whole, multiply_adds=products)

    @classmethod
    def of(cls, dim: int, mixer: Mamba2D, behind: nn.Module | None) -> PlainMixer:
        """Read the sizes off a mixer and the convolutions behind its layer."""
        rank, state, _ = mixer.splits
        conv = mixer.conv2d
        convs = [] if behind is None else [m for m in behind.modules() if isinstance(m, nn.Conv2d)]
        return cls(
            dim=dim,
            inner=conv.in_channels,
            state=state,
            rank=rank,
            kernel=conv.kernel_size[0],
            behind=sum(other.kernel_size[0] for other in convs),
        )


def stem_products(stem: nn.Module, size: tuple[int, int]) -> int:
    """Add up the convolutions of the stem, each at the size that it leaves to the next."""
    products, (height, width) = 0, size
    for conv in stem.modules():
        if isinstance(conv, nn.Conv2d):
            height, width = (_steps(conv, n, side) for n, side in enumerate((height, width)))
            products += height * width * conv.weight.numel()
    return products


def _steps(conv: nn.Conv2d, axis: int, side: int) -> int:
    """Return the places that a convolution takes along a side."""
    padding = cast("tuple[int, int]", conv.padding)[axis]
    return (side + 2 * padding - conv.kernel_size[axis]) // conv.stride[axis] + 1
