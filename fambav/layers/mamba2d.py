"""The Mamba mixer over a grid, scanned along four snakes.

    x, z = in_proj(hidden)      u = silu(conv2d(x))      dt, B, C = x_proj(u)
    y = scan(u, softplus(dt_proj(dt)), A, B + what the last move adds, C, D)      of every snake
    out = out_proj((sum of y) * silu(z))

Source: Yang et al., "PlainMamba", arXiv:2403.17695; Gu and Dao, "Mamba", arXiv:2312.00752,
algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.layers.embed import take
from fambav.layers.mamba import (
    bias_of,
    decay_rates,
    not_plain,
    rates,
    step_sizes,
    step_sizes_of,
    wide,
)
from fambav.layers.tokens import Ask, Signals, Tokens
from fambav.ops import selective_scan
from fambav.ops.bimamba import ScanInputs
from fambav.ops.cross_scan import (
    MOVES,
    ScanOrder,
    cross_merge,
    cross_scan,
    kept_order,
    snake_order,
    take_rows,
    to_scan_order,
    to_token_order,
)
from fambav.ops.scan_aligned import aligned_scan, estimate_skipped_dt
from fambav.registry import PARAM_ORDERS, nearest

Grid = tuple[int, int]

DIRECTIONS = 4  # snakes along which the grid is scanned
SIGNALS = frozenset(("u", "delta", "B", "C", "y", "z", "mixed"))  # all that it can tell
UNALIGNED = (
    "its weights pair the token of a step with the step size of another one, which may be gone;"
    " param_order 'permuted' pairs it with its own"
)


class Places(NamedTuple):
    """Where tokens are.

    Attributes:
        grid: Height and width of the grid.
        position: Place on it of each token, row by row, (batch, length), int64; None if the tokens
            are the whole grid row by row.
        orders: In which they are scanned.
    """

    grid: Grid
    position: Tensor | None
    orders: ScanOrder


class Mamba2D(nn.Module):
    """Project, convolve on the grid, scan in four directions, gate, project.

    All directions share the projections, A and D, so that the skip enters four times.  They are
    scanned in one call, stacked along the batch.

    Args:
        dim: Width of a token.
        grid: Height and width of the grid that the model starts with.
        state: Numbers of state per channel.
        kernel: Side of the convolution, odd.
        expand: Inner width, in units of dim.
        param_order: Whose step size, B and C meet the token of a step: "raster", those of the token
            that comes as late row by row, as the published weights need; "permuted", its own, as in
            the paper.
        dt_bias_twice: Add the bias of the step size twice, as the published weights need.

    Raises:
        ValueError: If param_order is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: Grid,
        state: int = 16,
        kernel: int = 7,
        expand: int = 2,
        param_order: str = "raster",
        dt_bias_twice: bool = True,
    ) -> None:
        super().__init__()
        if param_order not in PARAM_ORDERS:
            hint = nearest(param_order, PARAM_ORDERS)
            raise ValueError(f"param_order is {param_order!r}, expected a known order; {hint}")
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.grid, self.param_order, self.dt_bias_twice = grid, param_order, dt_bias_twice
        self.splits = (rank, state, state)

        # Names and order are those of the published weights.
        self.A_log = decay_rates(inner, state)
        self.D = nn.Parameter(torch.ones(inner))
        self.direction_Bs = nn.Parameter(0.02 * torch.randn(len(MOVES), state))
        self.in_proj = nn.Linear(dim, 2 * inner)
        self.conv2d = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = step_sizes(rank, inner)
        self.out_proj = nn.Linear(inner, dim)

    @overload
    def forward(self, hidden: Tensor, ask: None = ...) -> Tensor: ...

    @overload
    def forward(self, hidden: Tensor, ask: Ask) -> tuple[Tensor, Signals]: ...

    def forward(self, hidden: Tensor, ask: Ask | None = None) -> Tensor | tuple[Tensor, Signals]:
        """Mix on the grid.

        Args:
            hidden: (batch, length, dim).
            ask: Where the tokens come from and what to tell of them; without, they are the whole
                grid that the model starts with, row by row.

        Returns:
            Shaped like hidden; with `ask` also what was asked for.  What it tells of a token is
            what its scan step used, so step sizes, B and C are those of other tokens if
            param_order is "raster".

        Raises:
            ValueError: If the tokens do not fit the grid, or the state cannot age as asked.
        """
        places = self._places(hidden, ask)
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        u = on_image(x, places.grid, places.position, lambda image: F.silu(self.conv2d(image)))
        inputs = self._scan_inputs(u, places.orders)
        if ask is None or (ask.gap is None and "delta" not in ask.needs):
            y = self._scan(inputs)
        else:
            inputs, y = self._aged_scan(inputs, places, ask)
        y = y.unflatten(0, (hidden.shape[0], -1))
        out: Tensor = self.out_proj(cross_merge(y, places.orders) * F.silu(z))
        if ask is None:
            return out
        told = dict(zip(("u", "delta", "B", "C", "y"), (*inputs, y), strict=True))
        stacked = {
            name: to_token_order(tensor.view(*y.shape[:3], -1), places.orders)
            for name, tensor in told.items()
            if name in ask.needs
        }
        whole = {name: x for name, x in (("z", z), ("mixed", out)) if name in ask.needs}
        return out, Signals(order=places.orders.order, **stacked, **whole)

    def _places(self, hidden: Tensor, ask: Ask | None) -> Places:
        """Say where the tokens are: on a whole grid, or on some places of the start's."""
        grid, position = (self.grid, None) if ask is None else standing(ask.tokens, self.grid)
        whole = snake_order(grid, hidden.device)
        if position is not None:
            return Places(grid, position, kept_order(whole, position))
        if hidden.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"hidden has {hidden.shape[1]} tokens, expected {grid[0] * grid[1]} for a grid of"
                f" {grid[0]} x {grid[1]}"
            )
        return Places(grid, None, whole)

    def _scan_inputs(self, u: Tensor, orders: ScanOrder) -> ScanInputs:
        """Return u, delta, B and C of each step, all (batch * directions, length, their width).

        The step size is before softplus and before the bias that the scan adds.
        """
        dt, B, C = self.x_proj(u).split(self.splits, dim=-1)
        if self.dt_bias_twice:
            delta = self.dt_proj(dt)
        elif self._adds_bias:
            delta = F.linear(dt, self.dt_proj.weight)
        else:
            delta = step_sizes_of(self.dt_proj, dt)
        own = delta, B, C
        if self.param_order == "permuted":
            delta, B, C = (cross_scan(x, orders) for x in own)
        else:
            raster = own if orders.raster is None else [take_rows(x, orders.raster) for x in own]
            delta, B, C = (x[:, None].expand(-1, orders.directions, -1, -1) for x in raster)
        B = B + self.direction_Bs[orders.move]
        u, delta, B, C = (x.flatten(0, 1) for x in (cross_scan(u, orders), delta, B, C))
        return u, delta, B, C

    @property
    def _adds_bias(self) -> bool:
        """Whether the scan adds the bias of the step size; not if a called module has."""
        return self.dt_bias_twice or not_plain(self.dt_proj) is None

    def _bias(self) -> Tensor | None:
        """Return what the scan adds to the step size before softplus, (inner,)."""
        return wide(bias_of(self.dt_proj)) if self._adds_bias else None

    def _scan(self, inputs: ScanInputs) -> Tensor:
        """Scan, (batch * directions, length, inner)."""
        u, delta, B, C = inputs
        y: Tensor = selective_scan(
            u.mT,
            delta.mT,
            rates(self.A_log),
            B.mT,
            C.mT,
            wide(self.D),
            delta_bias=self._bias(),
            delta_softplus=True,
        )
        return y.mT

    def _aged_scan(self, inputs: ScanInputs, places: Places, ask: Ask) -> tuple[ScanInputs, Tensor]:
        """Scan across gaps; also return the inputs with the step size after softplus."""
        u, delta, B, C = inputs
        bias = self._bias()
        delta = F.softplus(wide(delta) if bias is None else wide(delta) + bias)
        gap = self._gap(delta, places, ask)
        y = aligned_scan(u, delta, rates(self.A_log), B, C, wide(self.D), gap)
        return (u, delta, B, C), y

    def _gap(self, delta: Tensor, places: Places, ask: Ask) -> Tensor | None:
        """Return the step sizes of what is gone before each step; None for none."""
        if ask.gap is None:
            return None
        if self.param_order == "raster":
            raise ValueError(f"gap policy is {ask.gap!r}, expected none, since {UNALIGNED}")
        if ask.gap == "cached":
            carried = ask.tokens.gap
            return None if carried is None else to_scan_order(carried, places.orders).flatten(0, 1)
        if places.orders.skipped is None:
            if places.grid != self.grid:
                raise ValueError(
                    f"gap policy is {ask.gap!r}, expected 'cached' for a grid that became smaller"
                )
            return None
        bias = wide(bias_of(self.dt_proj)) * (1 + self.dt_bias_twice)
        skipped = places.orders.skipped.flatten(0, 1)
        return estimate_skipped_dt(ask.gap, delta=delta, skipped=skipped, bias=bias)


def standing(tokens: Tokens, grid: Grid) -> tuple[Grid, Tensor | None]:
    """Say where tokens are.

    Args:
        tokens: Without class tokens.
        grid: Height and width of the grid that the model starts with.

    Returns:
        The grid, and the place on it of each token, row by row, (batch, length), or None if they
        are the whole of it row by row.
    """
    if tokens.alive is not None:
        return grid, None
    return (grid, tokens.position) if tokens.grid is None else (tokens.grid, None)


def on_image(
    x: Tensor, grid: Grid, position: Tensor | None, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a function of images to tokens.

    Args:
        x: Tokens, (batch, length, dim).
        grid: Height and width of the image.
        position: Where they are, as `standing` says; the image is zero at all other places.
        function: Keeps the shape (batch, dim, height, width).

    Returns:
        Its values where the tokens are, shaped like x.
    """
    if position is None:
        return function(x.mT.unflatten(2, grid)).flatten(2).mT
    index = position[..., None].expand_as(x)
    whole = x.new_zeros(x.shape[0], grid[0] * grid[1], x.shape[2]).scatter(1, index, x)
    return take(function(whole.mT.unflatten(2, grid)).flatten(2).mT, position)
