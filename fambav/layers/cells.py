"""The kept cells of a map while a stage reduces its tokens: between rows and the map.

    rows of kept cells, (batch, kept, dim)  <->  map, (batch, height, width, dim)

A merged cell stands for all its members: each has its row on the map, and from the map it gets
their mean.  A dropped cell is no row: within a mixer it is zero on the map; in the residual stream,
where convolutions of that see it and the next stage does, it stays what it was when it was dropped.
Cells that still form a grid, of fewer rows or columns, are a map of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fambav.layers.tokens import Tokens
from fambav.ops.cross_scan import select_rows
from fambav.ops.match import Selection, others
from fambav.ops.pool import pool
from fambav.ops.scan_paths import kept_paths, scan_paths

Grid = tuple[int, int]


class Cells:
    """Where kept cells are, and what dropped ones hold.

    Args:
        tokens: The kept cells, with `source`.
        dropped: The whole map row by row, as it was when cells were last dropped, (batch, height *
            width, dim); None before.

    Attributes:
        size: Members of each kept cell, (batch, kept), float32.
    """

    def __init__(self, tokens: Tokens, dropped: Tensor | None = None) -> None:
        if tokens.source is None or tokens.start_grid is None:
            raise ValueError("tokens have no source or grid, expected both on a map")
        self._source, self._position, self.size = tokens.source, tokens.position, tokens.size
        self._start: Grid = tokens.start_grid
        self._grid, self._dropped = tokens.grid, dropped
        self._has_merged, self._has_dropped = tokens.merged, tokens.dropped
        self._paths: dict[tuple[str, ...], Tensor] = {}

    def reduced(
        self, hook: Callable[[Tokens], Tokens], tokens: Tokens, stream: Tensor
    ) -> tuple[Tokens, Cells]:
        """Let a hook take cells away.

        Args:
            hook: Of a reduction.
            tokens: These cells.
            stream: What those that are dropped hold from then on, (batch, kept, dim).

        Returns:
            The cells that stay, and where they are.
        """
        fewer = hook(tokens)
        if fewer.position is tokens.position:
            return fewer, self
        return fewer, Cells(fewer, self.whole(stream) if fewer.dropped else None)

    def whole(self, rows: Tensor) -> Tensor:
        """Return a row for each cell of the map, (batch, height * width, dim)."""
        if self._grid == self._start:
            return rows
        return self._spread(rows, self._dropped)

    def to_map(self, rows: Tensor, *, stream: bool = False) -> Tensor:
        """Lay rows, (batch, kept, dim), out on a map; with `stream`, those of the residual stream.

        Of that, dropped cells hold what they were dropped with; anything else of them is zero.
        """
        if self._grid is not None:
            cells, grid = rows, self._grid
        else:
            cells, grid = self._spread(rows, self._dropped if stream else None), self._start
        laid_out: Tensor = cells.unflatten(1, grid)
        return laid_out

    def from_map(self, x: Tensor) -> Tensor:
        """Average a map over the members of each kept cell: (batch, kept, dim)."""
        cells = x.flatten(1, 2)
        if self._grid is not None:
            return cells
        if not self._has_merged:
            return select_rows(cells, self._position)
        return pool(cells, None, *self._members).x

    def convolve(
        self, conv: Callable[[Tensor], Tensor], rows: Tensor, *, stream: bool = False
    ) -> Tensor:
        """Convolve on the map, (batch, kept, in_channels) -> (batch, kept, out_channels)."""
        return self.from_map(conv(self.to_map(rows, stream=stream)))

    def paths(self, names: tuple[str, ...]) -> Tensor:
        """Return the orders in which paths read the kept cells, (kept, paths).

        They are (batch, kept, paths) where the cells form no grid, and samples keep other ones.
        """
        if names not in self._paths:
            grid, device = self._grid or self._start, self._source.device
            paths = scan_paths(grid, device, names)
            if self._grid is None:
                paths = kept_paths(paths, self._position)
            self._paths[names] = paths
        return self._paths[names]

    @cached_property
    def _members(self) -> tuple[Tensor, Tensor, Selection]:
        """Weights and sizes of the map's cells, (batch, height * width), and their groups.

        Dropped cells are in the group of the first kept one, without weight.
        """
        rest = others(self._position, self._source.shape[1])
        target = self._position.gather(1, self._source.gather(1, rest).clamp(min=0))
        weight = (self._source >= 0).to(self.size.dtype)
        return weight, weight, Selection(self._position, rest, target)

    def _spread(self, rows: Tensor, dropped: Tensor | None) -> Tensor:
        """Return rows by cell of the map; of dropped cells those of `dropped`, or zeros."""
        (batch, length), dim = self._source.shape, rows.shape[2]
        if not self._has_merged:
            whole = rows.new_zeros(batch * length, dim)
            if dropped is not None:
                whole = dropped.to(rows.dtype).flatten(0, 1)
            first = torch.arange(batch, device=rows.device)[:, None] * length
            index = (self._position + first).flatten()
            return whole.index_copy(0, index, rows.flatten(0, 1)).view(batch, length, dim)
        whole = select_rows(rows, self._source.clamp(min=0))
        if not self._has_dropped:
            return whole
        gone = (self._source < 0)[..., None]
        if dropped is None:
            return whole.masked_fill(gone, 0)
        return torch.where(gone, dropped.to(whole.dtype), whole)
