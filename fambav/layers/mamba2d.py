"""The Mamba mixer over a grid, scanned along four snake orders.

    x, z = in_proj(hidden)      u = silu(conv2d(x))      dt, B, C = x_proj(u)
    y = scan(u, softplus(dt_proj(dt)), A, B + what the last move adds, C, D)      of every order
    out = out_proj((sum of y) * silu(z))

Source: Yang et al., "PlainMamba", arXiv:2403.17695; Gu and Dao, "Mamba", arXiv:2312.00752,
algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.arguments import flags, known_name, whole
from fambav.layers.mamba import (
    A_from_log,
    apply_dt_proj,
    bias_of,
    init_A_log,
    init_dt_proj,
    not_plain,
    upcast,
)
from fambav.layers.tokens import Intermediates, Tokens
from fambav.ops.bimamba import ScanInputs, token_score
from fambav.ops.cross_scan import (
    MOVES,
    ScanOrder,
    cross_merge,
    cross_scan,
    kept_order,
    select_rows,
    snake_order,
    to_scan_order,
    to_token_order,
)
from fambav.ops.fused_bimamba import SCORES
from fambav.ops.scan_aligned import aligned_scan, estimate_skipped_dt
from fambav.registry import PARAM_ORDERS

Grid = tuple[int, int]

DIRECTIONS = 4  # snake orders in which the grid is scanned
UNALIGNED = (
    "its weights pair the token of a step with the step size of another one, which may be gone;"
    " param_order 'permuted' pairs it with its own"
)


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
        ValueError: If param_order is unknown, or another argument is not one of those above.
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
        known_name("param_order", param_order, PARAM_ORDERS)
        whole("state", state, least=1)
        flags(dt_bias_twice=dt_bias_twice)
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.grid, self.param_order, self.dt_bias_twice = grid, param_order, dt_bias_twice
        self.splits = (rank, state, state)

        # Names and order are those of the published weights.
        self.A_log = init_A_log(inner, state)
        self.D = nn.Parameter(torch.ones(inner))
        self.direction_Bs = nn.Parameter(0.02 * torch.randn(len(MOVES), state))
        self.in_proj = nn.Linear(dim, 2 * inner)
        self.conv2d = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = init_dt_proj(rank, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tokens | None = None,
        *,
        want: frozenset[str] = frozenset(),
        gap_policy: str | None = None,
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """Mix on the grid.

        Args:
            hidden: (batch, length, dim).
            tokens: Whose features they are: their positions, grid and skipped step sizes; without,
                they are the whole grid that the model starts with, row by row.
            want: Fields of `Intermediates` to return.
            gap_policy: How the state ages over tokens that went, see `registry.GAP_POLICIES`; None
                if it does not.

        Returns:
            Shaped like hidden; with `tokens` also the wanted intermediates.  Those of a token are
            what its scan step used, so step sizes, B and C are those of other tokens if param_order
            is "raster".

        Raises:
            ValueError: If the tokens do not fit the grid, or the state cannot age so.
        """
        grid, position, orders = self._layout(hidden, tokens)
        x, z = self.in_proj(hidden).chunk(2, dim=-1)  # both (batch, length, inner)
        u = apply_on_grid(x, grid, position, lambda image: F.silu(self.conv2d(image)))
        u, delta, B, C = self._scan_inputs(u, orders)
        policy = gap_policy or "none"
        y, dt = aligned_scan(
            *(u, delta, A_from_log(self.A_log), B, C, upcast(self.D)),
            *self._gaps(delta, grid, orders, tokens, policy),
            gap_policy=policy,
            delta_bias=self._bias(),
            delta_softplus=True,
            return_dt="delta" in want,
        )
        y = y.unflatten(
            0, (hidden.shape[0], orders.directions)
        )  # (batch, directions, length, inner)
        out: Tensor = self.out_proj(cross_merge(y, orders) * F.silu(z))  # (batch, length, dim)
        if tokens is None:
            return out
        used = dict(u=u, delta=delta if dt is None else dt, B=B.detach(), C=C.detach(), y=y)
        values = {
            name: to_token_order(x.view(*y.shape[:3], x.shape[-1]), orders)
            for name, x in used.items()
            if name in want
        }
        for name in SCORES:
            if name in want:
                each = to_token_order(y.detach(), orders)
                values[name] = token_score(each, z[:, None], name)[..., None]
        values |= {name: x for name, x in (("z", z), ("mixed", out)) if name in want}
        return out, Intermediates(order=orders.order, **values)

    def _layout(
        self, hidden: Tensor, tokens: Tokens | None
    ) -> tuple[Grid, Tensor | None, ScanOrder]:
        """Return the grid, positions on it as from `grid_position`, and the scan orders."""
        grid, position = (self.grid, None) if tokens is None else grid_position(tokens, self.grid)
        whole = snake_order(grid, hidden.device)
        if position is not None:
            return grid, position, kept_order(whole, position)
        if hidden.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"hidden has {hidden.shape[1]} tokens, expected {grid[0] * grid[1]} for a grid of"
                f" {grid[0]} x {grid[1]}"
            )
        return grid, None, whole

    def _scan_inputs(self, u: Tensor, orders: ScanOrder) -> ScanInputs:
        """Return u, delta, B and C of each step, all (batch * directions, length, their width).

        The step size is before softplus and before the bias that the scan adds.
        """
        dt, B, C = self.x_proj(u).split(self.splits, dim=-1)
        if self._called:
            delta = apply_dt_proj(self.dt_proj, dt)
        else:
            delta = F.linear(dt, self.dt_proj.weight)
        own = delta, B, C  # each (batch, length, its width)
        if self.param_order == "permuted":
            delta, B, C = (cross_scan(x, orders) for x in own)
        else:
            raster = own if orders.raster is None else [select_rows(x, orders.raster) for x in own]
            delta, B, C = (x[:, None].expand(-1, orders.directions, -1, -1) for x in raster)
        B = B + self.direction_Bs[orders.move]
        # (batch, directions, length, width) -> (batch * directions, length, width)
        u, delta, B, C = (x.flatten(0, 1) for x in (cross_scan(u, orders), delta, B, C))
        return u, delta, B, C

    @property
    def _called(self) -> bool:
        """Whether `dt_proj` is called as a module, which adds its bias."""
        return not_plain(self.dt_proj) is not None

    def _bias(self) -> Tensor | None:
        """Return what the scan adds to the step size before softplus, (inner,)."""
        times = 1 + self.dt_bias_twice - self._called
        return times * upcast(bias_of(self.dt_proj)) if times else None

    def _gaps(
        self, delta: Tensor, grid: Grid, orders: ScanOrder, tokens: Tokens | None, policy: str
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the step sizes of what is gone before each step, or how many they are.

        delta, (batch * directions, length, inner), gives the shape.
        """
        if policy == "none":
            return None, None
        if self.param_order == "raster":
            raise ValueError(f"gap policy is {policy!r}, expected none, since {UNALIGNED}")
        if policy == "cached":
            carried = None if tokens is None else tokens.skipped_dt
            return (None if carried is None else to_scan_order(carried, orders).flatten(0, 1)), None
        if orders.skipped is None:
            if grid != (self.grid if tokens is None else tokens.start_grid or self.grid):
                raise ValueError(
                    f"gap policy is {policy!r}, expected 'cached' for a grid that became smaller"
                )
            return None, None
        skipped = orders.skipped.flatten(0, 1)  # (batch * directions, length)
        if policy != "bias" or not self._called:
            return None, skipped
        bias = upcast(bias_of(self.dt_proj)) * (1 + self.dt_bias_twice)
        return estimate_skipped_dt(policy, delta=upcast(delta), skipped=skipped, bias=bias), None


def grid_position(tokens: Tokens, grid: Grid) -> tuple[Grid, Tensor | None]:
    """Return where tokens are.

    Args:
        tokens: Without class tokens.
        grid: Height and width of the grid that they start with, if they do not say it.

    Returns:
        The grid, and the index on it of each token, row by row, (batch, length), or None if they
        are the whole of it row by row.
    """
    start = tokens.start_grid or grid
    if tokens.keep_index is not None:
        return start, None
    return (start, tokens.position) if tokens.grid is None else (tokens.grid, None)


def apply_on_grid(
    x: Tensor, grid: Grid, position: Tensor | None, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a function of images to tokens.

    Args:
        x: Tokens, (batch, length, dim).
        grid: Height and width of the image.
        position: As from `grid_position`; the image is zero at all other places.
        function: Keeps the shape (batch, dim, height, width).

    Returns:
        Its values where the tokens are, shaped like x.
    """
    if position is None:
        return _on_whole_grid(x, grid, function)
    index = position[..., None].expand_as(x)
    whole = x.new_zeros(x.shape[0], grid[0] * grid[1], x.shape[2]).scatter(1, index, x)
    return select_rows(_on_whole_grid(whole, grid, function), position)


def _on_whole_grid(x: Tensor, grid: Grid, function: Callable[[Tensor], Tensor]) -> Tensor:
    # (batch, height * width, dim) -> (batch, dim, height, width) and back
    return function(x.mT.unflatten(2, grid)).flatten(2).mT
