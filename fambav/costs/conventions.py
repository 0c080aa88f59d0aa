"""What counts as one operation: three conventions, side by side.

A multiply-add of a matrix product or of a convolution counts 1 in all three.

literature        what papers print.  A scan adds 9 * length * inner * state, and its skip and gate
                  2 * length * inner.  Vim's papers count one of its two directions (convolution,
                  projections and scan); PlainMamba's count all four scans, and no gate.
all-directions    the same terms for every direction that is computed.
multiply-adds     products and convolutions of all directions, and nothing else: no scan.

Norms, activations, sums of streams and position embeddings count nowhere, nor do biases.  What a
reduction adds is in `reduction`.

Source: the scan's term is the community's, state-spaces/mamba issue 110; the other terms are those
that reproduce the figures of Shi et al., arXiv:2412.12496, and Yang et al., arXiv:2403.17695.
"""

from __future__ import annotations

from typing import NamedTuple

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
