"""Merge neighbours on the grid of patches, which stays a grid.

    rows: pairs of columns 0-1, 2-3, ... in each row        height x width  -> height x width'
    columns: the same of the tokens after that              height x width' -> height' x width'

Source: STORM, "spatial-aware token reduction", github.com/AOLIAO12312/STORM.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fambav.layers import BackboneInfo, Tokens
from fambav.ops.cross_scan import select_rows
from fambav.ops.match import Selection, others
from fambav.reduction.apply import interspersed
from fambav.reduction.reducer import Grid, Indices, Reducer, at_least, one_of, switch
from fambav.registry import REDUCERS

DISTANCES = ("l1", "l2", "cosine")
METRICS = ("residual", "hidden")
MERGES = ("mean", "sum")


@REDUCERS.register("storm")
class Storm(Reducer):
    """Merges as many pairs in every row, and then in every column, so that the grid stays one.

    A pair are the first and second, third and fourth, ... of a line.  A line is cut into windows,
    which contribute to its merges by their share of its pairs; in each the nearest pairs merge.
    A token becomes the mean of up to four, or, as in the published code, their sum.

    Class tokens are no part of the grid.  Each comes behind as many patches as are kept of those
    that were before it.

    Args:
        distance: Between two tokens, "l1", "l2" or "cosine".
        window: Pairs of a line that compete, 1 or more.
        metric: What is compared: "residual", the stream that blocks add to (x where there is none
            yet), or "hidden", x itself, which behind a mixer is its output.
        weighted: Whether a mean counts the patches behind each token.
        merge: "mean" or "sum".
    """

    hook = "after"
    ordered = False

    def __init__(
        self,
        *,
        distance: str = "l1",
        window: int = 5,
        metric: str = "residual",
        weighted: bool = True,
        merge: str = "mean",
    ) -> None:
        super().__init__()
        self.distance = one_of("distance", distance, DISTANCES)
        self.window = at_least("window", window, 1)
        self.metric = one_of("metric", metric, METRICS)
        self.weighted = switch("weighted", weighted)
        self.summed = one_of("merge", merge, MERGES) == "sum"

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Merge within rows and then within columns."""
        if tokens.grid is None:
            raise ValueError("grid is None, expected the one that the patches form")
        height, width = _smaller(tokens.grid, count)
        cls_index, length = tokens.cls_index, tokens.x.shape[1]
        grid = self._grid(tokens, tokens.grid)
        grid, *rows = self._shorter(grid, tokens.grid[1] - width)
        grid, *columns = self._shorter(grid.turned(), tokens.grid[0] - height)
        # A source of a token that is itself merged within its column goes on to that one's target.
        into = torch.arange(length, device=cls_index.device).expand(cls_index.shape[0], -1)
        into = into.scatter(1, columns[0], columns[1])
        source = torch.cat((rows[0], columns[0]), dim=1)
        target = torch.cat((into.gather(1, rows[1]), columns[1]), dim=1)
        patches = rearrange(grid.turned().indices, "b h w -> b (h w)")
        before = (patches[:, None] < cls_index[..., None]).sum(dim=2)
        new = before + torch.arange(cls_index.shape[1], device=cls_index.device)
        return Selection(interspersed(patches, cls_index, new), source, target)

    def limit(self, length: int, cls_index: Indices) -> int:
        """Return three quarters of the patches, though not every number leaves a grid."""
        return 3 * (length - len(cls_index)) // 4

    @staticmethod
    def grid_after(grid: Grid | None, count: int) -> Grid | None:
        """Return the grid of so many patches less that has most nearly the same proportions.

        Of two as near the wider one; each side keeps half of its length or more.

        Raises:
            ValueError: If there is none.
        """
        if grid is None:
            raise ValueError("none, since the patches form no grid")
        return _smaller(grid, count)

    @classmethod
    def published(cls, info: BackboneInfo) -> str | None:
        """Return the schedule of the published code, for a PlainMamba on a grid of 14 x 14."""
        if info.family != "plainmamba" or info.grid != (14, 14) or info.depth not in (24, 36):
            return None
        return "tokens:169,144,100,81@5,11,17,23"

    def _grid(self, tokens: Tokens, grid: Grid) -> _Grid:
        """Lay out the patches, without the class tokens."""
        x = tokens.x
        if self.metric == "residual" and tokens.residual is not None:
            x = tokens.residual
        index = others(tokens.cls_index, x.shape[1])
        x = select_rows(x.detach(), index).float()
        weight = tokens.size.gather(1, index)
        if self.summed or not self.weighted:
            weight = torch.ones_like(weight)
        # (batch, height * width, ...) -> (batch, height, width, ...)
        return _Grid(x.unflatten(1, grid), weight.unflatten(1, grid), index.unflatten(1, grid))

    def _shorter(self, grid: _Grid, count: int) -> tuple[_Grid, Tensor, Tensor]:
        """Merge `count` pairs in each row.

        Returns:
            The grid after that, and the indices of sources and targets, (batch, height * count).
        """
        even = 2 * self._nearest_pairs(grid.x, count)
        odd = even + 1
        x, weight, index = (part.flatten(0, 1) for part in grid)  # (batch * height, width, ...)
        weight_even, weight_odd = weight.gather(1, even), weight.gather(1, odd)
        total = torch.ones_like(weight_odd) if self.summed else weight_even + weight_odd
        first, second = select_rows(x, even), select_rows(x, odd)
        mean = (first * weight_even[..., None] + second * weight_odd[..., None]) / total[..., None]
        x = x.scatter(1, odd[..., None].expand_as(mean), mean)
        weight = weight.scatter(1, odd, total)
        keep, sides = others(even, x.shape[1]), grid.x.shape[:2]
        kept = _Grid(select_rows(x, keep), weight.gather(1, keep), index.gather(1, keep))
        return (
            _Grid(*(part.unflatten(0, sides) for part in kept)),
            index.gather(1, even).unflatten(0, sides).flatten(1),
            index.gather(1, odd).unflatten(0, sides).flatten(1),
        )

    def _nearest_pairs(self, x: Tensor, count: int) -> Tensor:
        """Return the numbers of the pairs that merge in each row, (batch * height, count)."""
        pairs = x.shape[2] // 2
        lines = x[:, :, : 2 * pairs].flatten(0, 1)
        apart = _distance(lines[:, 0::2], lines[:, 1::2], self.distance)  # (batch * height, pairs)
        found = [lines.new_empty(lines.shape[0], 0, dtype=torch.int64)]
        shares = _shares(pairs, count, self.window)
        for start, share in zip(range(0, pairs, self.window), shares, strict=True):
            near = apart[:, start : start + self.window].sort(dim=1, stable=True).indices
            found.append(start + near[:, :share])
        return torch.cat(found, dim=1)


class _Grid(NamedTuple):
    """Tokens on a grid.

    Attributes:
        x: What is compared, (batch, height, width, dim), float32.
        weight: Weight of each in a mean, (batch, height, width), float32.
        indices: Of each in the sequence, (batch, height, width), int64.
    """

    x: Tensor
    weight: Tensor
    indices: Tensor

    def turned(self) -> _Grid:
        """Swap rows and columns."""
        return _Grid(*(part.transpose(1, 2) for part in self))


def _smaller(grid: Grid, count: int) -> Grid:
    """Return the grid of `Storm.grid_after`."""
    height, width = grid
    heights, widths = (range(side - side // 2, side + 1) for side in grid)
    kept = height * width - count
    found = [(h, kept // h) for h in heights if kept % h == 0 and kept // h in widths]
    if not found:
        possible = {height * width - h * w for h in heights for w in widths} - {0}
        near = min(possible, key=lambda other: (abs(other - count), other), default=0)
        raise ValueError(
            f"a number that makes of {height} x {width} patches a smaller grid, such as {near}"
        )
    return min(found, key=lambda sides: (abs(sides[0] * width - sides[1] * height), sides[0]))


def _shares(pairs: int, count: int, window: int) -> list[int]:
    """Divide merges among windows in proportion to their pairs; remainders go to the largest."""
    sizes = [min(window, pairs - start) for start in range(0, pairs, window)]
    shares = [count * size // pairs for size in sizes]
    by_rest = sorted(range(len(sizes)), key=lambda n: -(count * sizes[n] % pairs))
    for n in by_rest[: count - sum(shares)]:
        shares[n] += 1
    return shares


def _distance(first: Tensor, second: Tensor, distance: str) -> Tensor:
    """Return the distance between rows, over the last dimension."""
    if distance == "cosine":
        return -F.cosine_similarity(first, second, dim=-1, eps=1e-12)
    difference = first - second
    return difference.abs().sum(dim=-1) if distance == "l1" else difference.norm(dim=-1)
