"""What it costs to choose tokens, to take them away, and to scan as if they were still there.

    matching      6 * L * D elementwise, 2 * D * (L / 2) ** 2 for the similarities, r * D for what
                  is added to other tokens; L tokens of width D before, r of them go
    scores        one operation for each number that is summed to a token's score
    alignment     3 or 4 operations for each inner number of each token in each direction

Figures of a direction count once in the literature convention for Vim, whose papers count one of
its two directions.  Of all this, multiply-adds counts the products of similarities, once.  Sorting
and gathering are not arithmetic and are free.

Source: matching as the counter behind the figures of Shi et al., arXiv:2412.12496, which counts
the similarities' multiply-adds twice; the rest is counted off our own formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fambav.models.flops import FREE, Cost
from fambav.registry import Registry


class Overhead(NamedTuple):
    """One reduction of one image: the sizes that its cost depends on.

    Attributes:
        length: Tokens before, class tokens included.
        gone: Tokens that go.
        dim: Width of a token.
        inner: Width inside a mixer.
        scans: Directions of a mixer.
        printed: Directions that papers count.
    """

    length: int
    gone: int
    dim: int
    inner: int
    scans: int
    printed: int


OVERHEADS: Registry[Callable[[Overhead], Cost]] = Registry("method")


@OVERHEADS.register("famba-v")
@OVERHEADS.register("ordered")
@OVERHEADS.register("r-meeto")
@OVERHEADS.register("tome")
def matching(sizes: Overhead) -> Cost:
    """Match even tokens with odd ones and merge: 6LD + 2D(L/2)^2 + rD."""
    products = sizes.dim * (sizes.length // 2) * (sizes.length - sizes.length // 2)
    rest = 6 * sizes.length * sizes.dim + sizes.gone * sizes.dim
    whole = rest + sizes.dim * sizes.length**2 // 2
    return Cost(whole, whole, products)


@OVERHEADS.register("prune-aligned")
@OVERHEADS.register("evit")
def scores(sizes: Overhead) -> Cost:
    """Score each token by what the scans give at it: L * inner in each direction."""
    each = sizes.length * sizes.inner
    return Cost(sizes.printed * each, sizes.scans * each)


@OVERHEADS.register("random")
def nothing(sizes: Overhead) -> Cost:
    """Draw at random: free."""
    del sizes
    return FREE


@OVERHEADS.register("mtr")
def scored_matching(sizes: Overhead) -> Cost:
    """Score as `scores`, match the r lowest with all the others, and merge.

    The similarities are r * (L - r) * D multiply-adds, the elementwise terms those of `matching`.
    """
    products = sizes.gone * (sizes.length - sizes.gone) * sizes.dim
    return _merged(sizes, scores(sizes), products)


@OVERHEADS.register("utrc")
def halved_matching(sizes: Overhead) -> Cost:
    """Score as `scores`, match the lower half with the upper one, and merge or drop."""
    products = sizes.dim * (sizes.length // 2) * (sizes.length - sizes.length // 2)
    return _merged(sizes, scores(sizes), products)


@OVERHEADS.register("stm")
def neighbours(sizes: Overhead) -> Cost:
    """Compare each token with the next one, (L - 1) * D multiply-adds, and merge."""
    return _merged(sizes, FREE, (sizes.length - 1) * sizes.dim)


@OVERHEADS.register("storm")
def windows(sizes: Overhead) -> Cost:
    """Compare pairs along rows and then along columns, and merge: no products.

    A difference, its size and a sum for each number of L / 2 pairs, twice; r * D sums.
    """
    whole = 3 * sizes.length * sizes.dim + sizes.gone * sizes.dim
    return Cost(whole, whole)


def handed_over(sizes: Overhead, gap: str) -> Cost:
    """Return what it costs to hand step sizes of tokens that go to the tokens behind them.

    Only the policy "cached" keeps step sizes: two sums for each inner number of each token that
    goes, one with what was handed to it before and one where it is handed on.

    Args:
        sizes: The reduction.
        gap: The gap policy; "none" if scans are not aligned.
    """
    if gap != "cached":
        return FREE
    each = 2 * sizes.gone * sizes.inner
    return Cost(sizes.printed * each, sizes.scans * each)


def aligned(length: int, sizes: Overhead, gap: str) -> Cost:
    """Return what it costs a mixer to let its states age over tokens that went before.

    A sum, a quotient and a product for each inner number of each token in each direction; policies
    other than "cached" first multiply a step size by the number of tokens that went.

    Args:
        length: Tokens that the mixer sees.
        sizes: Widths and directions; the tokens there are not used.
        gap: The gap policy; "none" if the scan knows of no gaps.
    """
    if gap == "none":
        return FREE
    each = (3 if gap == "cached" else 4) * length * sizes.inner
    return Cost(sizes.printed * each, sizes.scans * each)


def _merged(sizes: Overhead, score: Cost, products: int) -> Cost:
    """Add similarities, counted twice as papers do, and the elementwise terms of merging."""
    rest = 6 * sizes.length * sizes.dim + sizes.gone * sizes.dim + 2 * products
    return Cost(score.literature + rest, score.all_directions + rest, products)
