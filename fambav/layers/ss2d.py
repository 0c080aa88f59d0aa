"""The two-dimensional selective scan of VMamba: a map read along several paths at once.

    x, z = in_proj(map)      u = silu(conv2d(x))      z only with a gate
    of each path:  dt, B, C = x_proj(u)      y = scan(u, softplus(dt_proj(dt)), A, B, C, D)
    out = out_proj(norm(sum of y over the paths) * silu(z))

Source: Liu et al., "VMamba", arXiv:2401.10166, section 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.arguments import whole
from fambav.layers.hierarchy import Float32LayerNorm, MapConv2d
from fambav.layers.mamba import A_from_log, init_A_log, init_dt_proj, upcast
from fambav.ops import selective_scan
from fambav.ops.scan_paths import CROSS, merge_paths, read_paths, scan_paths, to_steps


class SS2D(nn.Module):
    """Project, convolve, scan along every path in one call, normalise, gate, project.

    Paths have their own projections, A, D and step size.

    Args:
        dim: Width of a cell.
        state: Numbers of state per channel.
        expand: Inner width, in units of dim.
        gated: Multiply by silu(z) behind the norm.
        conv_bias: Whether the convolution adds a bias.
        paths: Of `fambav.ops.scan_paths.PATHS`, in the order of the weights.

    Raises:
        ValueError: If state or the inner width is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 1,
        expand: float = 1.0,
        gated: bool = False,
        conv_bias: bool = False,
        paths: tuple[str, ...] = CROSS,
    ) -> None:
        super().__init__()
        whole("state", state, least=1)
        inner = whole("inner width of a scan", int(expand * dim), least=1)
        rank, number = math.ceil(dim / 16), len(paths)
        self.paths, self.gated, self.splits = paths, gated, (rank, state, state)

        # Names, shapes and order are those of the published weights.
        bound = inner**-0.5
        x_proj = torch.empty(number, sum(self.splits), inner).uniform_(-bound, bound)
        self.x_proj_weight = nn.Parameter(x_proj)
        self.A_logs = init_A_log(number * inner, state)
        self.Ds = nn.Parameter(torch.ones(number * inner))
        dt_projs = [init_dt_proj(rank, inner) for _ in paths]
        self.dt_projs_weight = nn.Parameter(torch.stack([dt.weight.detach() for dt in dt_projs]))
        self.dt_projs_bias = nn.Parameter(torch.stack([dt.bias.detach() for dt in dt_projs]))
        if not gated:
            self.out_norm = Float32LayerNorm(inner)
        self.in_proj = nn.Linear(dim, (2 if gated else 1) * inner, bias=False)
        self.conv2d = MapConv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        if gated:
            self.out_norm = Float32LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map, (batch, height, width, dim); the shape stays."""
        x = self.in_proj(x)
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        u = F.silu(self.conv2d(x))  # (batch, height, width, inner)
        y = self._scan(u.flatten(1, 2), (u.shape[1], u.shape[2])).view(u.shape)
        y = self.out_norm(y).to(u.dtype)
        out: Tensor = self.out_proj(y if z is None else y * F.silu(z))
        return out

    def _scan(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        """Scan along all paths and add up, (batch, length, inner), in float32 or float64."""
        paths = scan_paths(grid, u.device, self.paths)
        number = len(self.paths)
        projected = F.linear(u, self.x_proj_weight.flatten(0, 1))  # of cells, for every path
        projected = to_steps(projected.unflatten(2, (number, -1)), paths)
        dt, B, C = projected.split(self.splits, dim=3)  # each (batch, length, paths, its width)
        delta = torch.einsum("blkr,kdr->blkd", dt, self.dt_projs_weight)
        u = read_paths(u, paths)  # (batch, length, paths, inner)
        y: Tensor = selective_scan(
            u.flatten(2).mT,  # (batch, paths * inner, length)
            delta.flatten(2).mT,
            A_from_log(self.A_logs),
            B.permute(0, 2, 3, 1),  # (batch, paths, state, length)
            C.permute(0, 2, 3, 1),
            upcast(self.Ds),
            delta_bias=upcast(self.dt_projs_bias).flatten(),
            delta_softplus=True,
            out_dtype=torch.promote_types(u.dtype, torch.float32),
        )
        return merge_paths(y.mT.unflatten(2, (number, -1)), paths)
