"""What the parts of a model cost, by arithmetic on sizes, in three conventions.

A multiply-add of a matrix product or of a convolution counts 1 in all three.

literature        what papers print.  A scan adds 9 * length * inner * state, and its skip and gate
                  2 * length * inner.  Vim's papers count one of its two directions (convolution,
                  projections and scan); PlainMamba's count all four scans, and no gate.
all-directions    the same terms for every direction that is computed.
multiply-adds     products and convolutions of all directions, and nothing else: no scan.

Norms, activations, sums of streams and position embeddings count nowhere, nor do biases; but the
first two conventions add, in hierarchical models, 5 for each number that is normalised over its
token, 2 over the batch, and 1 for each that is pooled (not in GroupMamba's literature), as their
counters do.  Forecasts are counted as Vim's layers are, each mixer by itself.  VSSD's
counts, in literature, one head where several share a factor of a product; the other two count all.

A reduction adds, where L tokens of width D come in and r of them are removed:

matching          6 * L * D elementwise, 2 * D * (L / 2) ** 2 for the similarities, r * D for what
                  is added to other tokens
scores            one operation for each number that is summed to a token's score
alignment         3 or 4 operations for each inner number of each token in each direction

Of these, multiply-adds counts the products of similarities, once, and literature the directions
that papers count.  Sorting and gathering are not arithmetic and are free.

Arithmetic, because papers count what no operator does, and since a search counts thousands of
plans; tests compare multiply-adds with torch's counter on the meta device.

Source: the scan's term is the community's, state-spaces/mamba issue 110; the other terms are those
that reproduce the figures of Shi et al., arXiv:2412.12496, and Yang et al., arXiv:2403.17695.  The
counter behind the former counts the multiply-adds of similarities twice.  The terms of other
reductions follow our own formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

from torch import nn

from fambav.layers.group_mamba import GroupMambaMixer
from fambav.layers.hierarchy import PatchMerging
from fambav.layers.mamba import Mamba
from fambav.layers.mamba2d import DIRECTIONS, Mamba2D
from fambav.layers.ss2d import SS2D
from fambav.registry import Registry

CONVENTIONS: dict[str, str] = {
    "literature": "as papers print it: multiply-adds and scan terms, one direction of Vim's two",
    "all-directions": "multiply-adds and scan terms of every direction",
    "multiply-adds": "multiply-adds of products and convolutions, no scan terms",
}
SCAN = 9  # for each number of state and token, as papers count
NORM, BATCH_NORM = 5, 2  # for each number normalised, as papers of hierarchical models count


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
    def of_products(cls, products: int) -> Cost:
        """Return the cost of multiply-adds that all conventions count alike."""
        return cls(products, products, products)

    def as_dict(self) -> dict[str, int]:
        """Return the counts under the conventions' names."""
        return dict(zip(CONVENTIONS, self, strict=True))


FREE = Cost()


def times(number: int, cost: Cost) -> Cost:
    """Multiply a cost."""
    return Cost(*(number * each for each in cost))


def total(*costs: Cost) -> Cost:
    """Add costs, convention by convention."""
    return Cost(*map(sum, zip(*costs, strict=True))) if costs else FREE


class ModelCost(NamedTuple):
    """The cost of an image in a model, beside the sizes in its `info`.

    Attributes:
        patches: Cost of the patch embedding.
        layers: For each layer, the cost of its mixer and all else as a function of the tokens that
            it sees, class tokens included, and of the cells of the grid of its 2D convolutions.
        head: Cost of the classifier.
        inner: Width inside a mixer.
        published_directions: Scans of a mixer that papers count.
    """

    patches: Cost
    layers: tuple[Callable[[int, int], Cost], ...]
    head: Cost
    inner: int
    published_directions: int


class HierarchicalCost(NamedTuple):
    """The cost of an image in a model of stages, beside the sizes in its `info`.

    Attributes:
        patches: Cost of the first map.
        leading: For each stage, the cost of what leads to it from the one before.
        blocks: For each stage, the cost of each block.
        head: Cost of the final norm, the mean and the classifier.
    """

    patches: Cost
    leading: tuple[Cost, ...]
    blocks: tuple[tuple[Cost, ...], ...]
    head: Cost


class ForecasterCost(NamedTuple):
    """The cost of a forecast of some variates.

    Attributes:
        tokens: Tokens of all variates together; of a model without any, the variates.
        patches: Cost of the embedding.
        layers: Cost of each layer.
        head: Cost of what makes the forecast.
    """

    tokens: int
    patches: Cost
    layers: tuple[Cost, ...]
    head: Cost


def mamba_cost(mixer: Mamba, dim: int, length: int, cells: int) -> Cost:
    """Return the cost of a mixer of Vim: two projections; convolution, projections, scan each way.

    Papers count the convolution at every index of the padded sequence, `kernel - 1` more than
    there are tokens.

    Args:
        mixer: Weights may be on the meta device.
        dim: Width of a token.
        length: Tokens.
        cells: Not used, since the convolution follows the sequence.
    """
    del cells
    (rank, state, _), inner = mixer.splits, mixer.A_log.shape[0]
    kernel: int = mixer.conv1d.kernel_size[0]
    branches = 2 if mixer.bimamba_type == "v2" else 1  # each with weights of its own
    scans = 1 if mixer.bimamba_type == "none" else 2
    around = 3 * length * dim * inner  # in_proj to twice the inner width, out_proj
    projected = length * inner * (2 * rank + 2 * state)  # x_proj to rank + 2 state, dt_proj
    convolved, padded = (n * inner * kernel for n in (length, length + kernel - 1))
    scanned = SCAN * length * inner * state + 2 * length * inner
    products = around + branches * (convolved + projected)
    return Cost(
        literature=around + padded + projected + scanned,
        all_directions=products + scans * scanned,
        multiply_adds=products,
    )


def mamba2d_cost(
    mixer: Mamba2D, dim: int, after: nn.Module | None, length: int, cells: int
) -> Cost:
    """Return the cost of a layer of PlainMamba, whose scans share the projections.

    Papers count all scans, with 9 * length * inner * state and length * inner each.

    Args:
        mixer: Weights may be on the meta device.
        dim: Width of a token.
        after: Has the convolutions of each channel after the mixer, if there are any.
        length: Tokens.
        cells: Of the grid on which convolutions run.
    """
    (rank, state, _), inner = mixer.splits, mixer.A_log.shape[0]
    around = 3 * length * dim * inner
    projected = length * inner * (2 * rank + 2 * state)
    convolved = cells * mixer.conv2d.weight.numel()
    convolved += cells * sum(conv.weight.numel() for conv in _convolutions(after))
    scanned = SCAN * length * inner * state + length * inner
    products = around + projected + convolved
    everything = products + DIRECTIONS * scanned
    return Cost(literature=everything, all_directions=everything, multiply_adds=products)


def ss2d_cost(mixer: SS2D, grid: tuple[int, int], kept: int | None = None) -> Cost:
    """Return the cost of a mixer of VMamba: projections, convolution, and the scans of all paths.

    Papers count all scans, with 9 * length * inner * state and length * inner each.

    Args:
        mixer: Weights may be on the meta device.
        grid: Height and width of the map.
        kept: Cells that are scanned; all by default.
    """
    length = math.prod(grid) if kept is None else kept
    channels = mixer.Ds.numel()  # of all paths together
    own = mixer.x_proj_weight.numel() + mixer.dt_projs_weight.numel()
    scanned = length * channels * (SCAN * mixer.splits[1] + 1)
    products = Cost.of_products(length * own)
    return total(map_cost(mixer, grid, kept), products, Cost(scanned, scanned))


def nc_ssd_cost(length: int, inner: int, state: int, heads: int) -> Cost:
    """Return the cost of summing tokens into a state that is not causal, and of reading it.

    Papers count the products of one head, since their counter takes those of several, which share B
    and C, for one.

    Args:
        length: Tokens.
        inner: Width of all heads together.
        state: Width of the state of a head.
        heads: How many there are.
    """
    products = 2 * length * inner * state
    return Cost(products // heads, products, products)


def group_mamba_cost(mixer: GroupMambaMixer, grid: tuple[int, int]) -> Cost:
    """Return the cost of a mixer of GroupMamba, whose norm runs twice and whose affinity once.

    Papers do not count the mean that the affinity is computed from.  Products of cells with each
    other's numbers, three for each number, count nowhere.

    Args:
        mixer: Weights may be on the meta device.
        grid: Height and width of the map.
    """
    affinity = (map_cost(part, (1, 1)) for part in (mixer.fc1, mixer.fc2))
    rest = (map_cost(part, grid) for part in (mixer.norm, mixer.norm, mixer.proj))
    mean = Cost(0, math.prod(grid) * mixer.fc1.in_features)
    return total(mean, *affinity, *rest, *(ss2d_cost(each, grid) for each in mixer.mixers))


def map_cost(module: nn.Module, grid: tuple[int, int], kept: int | None = None) -> Cost:
    """Add up the linear maps, convolutions and norms of a module over the cells of a map.

    Args:
        module: Its parts are in the order in which a map meets them, as far as they change its
            size.
        grid: Height and width of the map that it reads.
        kept: Cells that linear maps and layer norms work on, where convolutions keep the size; all
            by default.
    """
    products = norms = 0
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            grid = _convolved(part, grid)
        elif isinstance(part, PatchMerging):
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        cells = math.prod(grid)
        if kept is not None and not isinstance(part, nn.Conv2d):
            cells = kept
        if isinstance(part, nn.Conv2d | nn.Linear):
            products += cells * part.weight.numel()
        elif isinstance(part, nn.LayerNorm):
            norms += NORM * cells * part.weight.numel()
        elif isinstance(part, nn.BatchNorm2d):
            norms += BATCH_NORM * math.prod(grid) * part.num_features
    return Cost(products + norms, products + norms, products)


def stem_cost(stem: nn.Module, size: tuple[int, int]) -> Cost:
    """Add up the convolutions of a patch embedding, each at the size that the one before leaves."""
    products = 0
    for conv in _convolutions(stem):
        size = _convolved(conv, size)
        products += math.prod(size) * conv.weight.numel()
    return Cost.of_products(products)


def _convolved(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width behind a convolution."""
    padding = cast("tuple[int, int]", conv.padding)
    sides = zip(size, padding, conv.kernel_size, conv.stride, strict=True)
    height, width = ((side + 2 * pad - k) // stride + 1 for side, pad, k, stride in sides)
    return height, width


def _convolutions(module: nn.Module | None) -> list[nn.Conv2d]:
    return [] if module is None else [m for m in module.modules() if isinstance(m, nn.Conv2d)]


class Overhead(NamedTuple):
    """One reduction of one image: the sizes that its cost depends on.

    Attributes:
        length: Tokens before, class tokens included.
        removed: Tokens removed.
        dim: Width of a token.
        inner: Width inside a mixer.
        directions: Directions of a mixer.
        published: Directions that papers count.
    """

    length: int
    removed: int
    dim: int
    inner: int
    directions: int
    published: int

    def each_direction(self, operations: int) -> Cost:
        """Return the cost of so many operations in each direction."""
        return Cost(self.published * operations, self.directions * operations)

    def merging(self, products: int, scores: Cost = FREE) -> Cost:
        """Add similarities, counted twice as papers do, to scores and the terms of merging."""
        rest = (6 * self.length + self.removed) * self.dim + 2 * products
        return Cost(scores.literature + rest, scores.all_directions + rest, products)


OVERHEADS: Registry[Callable[[Overhead], Cost]] = Registry("method")


@OVERHEADS.register("famba-v")
@OVERHEADS.register("ordered")
@OVERHEADS.register("r-meeto")
@OVERHEADS.register("tome")
def matching(sizes: Overhead) -> Cost:
    """Match even tokens with odd ones and merge: 6LD + 2D(L/2)^2 + rD."""
    everything = (6 * sizes.length + sizes.removed) * sizes.dim + sizes.dim * sizes.length**2 // 2
    return Cost(everything, everything, _half_products(sizes))


@OVERHEADS.register("prune-aligned")
@OVERHEADS.register("evit")
def scores(sizes: Overhead) -> Cost:
    """Score each token by the output of the scans: L * inner in each direction."""
    return sizes.each_direction(sizes.length * sizes.inner)


@OVERHEADS.register("random")
def nothing(sizes: Overhead) -> Cost:
    """Draw at random: free."""
    del sizes
    return FREE


@OVERHEADS.register("mtr")
def scored_matching(sizes: Overhead) -> Cost:
    """Score as `scores`, match the r lowest with all the others, r * (L - r) * D, and merge."""
    products = sizes.removed * (sizes.length - sizes.removed) * sizes.dim
    return sizes.merging(products, scores(sizes))


@OVERHEADS.register("utrc")
def halved_matching(sizes: Overhead) -> Cost:
    """Score as `scores`, match the lower half with the upper one, and merge or drop."""
    return sizes.merging(_half_products(sizes), scores(sizes))


@OVERHEADS.register("stm")
def neighbours(sizes: Overhead) -> Cost:
    """Compare each token with the next one, (L - 1) * D multiply-adds, and merge."""
    return sizes.merging((sizes.length - 1) * sizes.dim)


@OVERHEADS.register("storm")
def windows(sizes: Overhead) -> Cost:
    """Compare pairs along rows and then along columns, and merge: no products.

    A difference, its size and a sum for each number of L / 2 pairs, twice; r * D sums.
    """
    everything = (3 * sizes.length + sizes.removed) * sizes.dim
    return Cost(everything, everything)


def _half_products(sizes: Overhead) -> int:
    return sizes.dim * (sizes.length // 2) * (sizes.length - sizes.length // 2)


def carrying(sizes: Overhead, gap: str) -> Cost:
    """Return the cost of carrying the step sizes of removed tokens to the tokens after them.

    Only the gap policy "cached" keeps step sizes: two sums for each inner number of each removed
    token, one with what was carried to it before and one where it is carried on.
    """
    return sizes.each_direction(2 * sizes.removed * sizes.inner) if gap == "cached" else FREE


def alignment(length: int, sizes: Overhead, gap: str) -> Cost:
    """Return the cost, in a mixer of `length` tokens, of letting states age over removed ones.

    A sum for each inner number of each token in each direction, in the exponent of the decay; gap
    policies other than "cached" first multiply a step size by the number of removed tokens.
    """
    each = {"none": 0, "cached": 1}.get(gap, 2)
    return sizes.each_direction(each * length * sizes.inner)
