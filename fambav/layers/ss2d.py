"""The two-dimensional selective scan of VMamba: a map read along several paths at once.

    x, z = in_proj(map)      u = silu(conv2d(x))      z only with a gate
    of each path:  dt, B, C = x_proj(u)      y = scan(u, softplus(dt_proj(dt)), A, B, C, D)
    out = out_proj(norm(sum of y over the paths) * silu(z))

Source: Liu et al., "VMamba", arXiv:2401.10166, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.arguments import whole
from fambav.layers.cells import Cells
from fambav.layers.hierarchy import Float32LayerNorm, MapConv2d
from fambav.layers.mamba import A_from_log, init_A_log, init_dt_proj, upcast
from fambav.layers.tokens import Intermediates
from fambav.ops import selective_scan
from fambav.ops.bimamba import token_score
from fambav.ops.fused_bimamba import SCORES
from fambav.ops.scan_order import to_steps
from fambav.ops.scan_paths import CROSS, scan_paths


class PathScans(nn.Module):
    """Weights of selective scans along several paths, under VMamba's names.

    Paths have their own projections, A, D and step size.

    Attributes:
        splits: Numbers of step size, B and C of a path that the projection gives.
        x_proj_weight: (paths, rank + 2 * state, inner).
        A_logs: (paths * inner, state).
        Ds: (paths * inner,).
        dt_projs_weight: (paths, inner, rank).
        dt_projs_bias: (paths, inner).
    """

    splits: tuple[int, int, int]

    def add_scans(self, paths: int, inner: int, *, rank: int, state: int) -> None:
        """Draw the weights, in this order, which is that of the published ones."""
        self.splits = (rank, state, state)
        bound = inner**-0.5
        x_proj = torch.empty(paths, sum(self.splits), inner).uniform_(-bound, bound)
        self.x_proj_weight = nn.Parameter(x_proj)
        self.A_logs = init_A_log(paths * inner, state)
        self.Ds = nn.Parameter(torch.ones(paths * inner))
        dt_projs = [init_dt_proj(rank, inner) for _ in range(paths)]
        self.dt_projs_weight = nn.Parameter(torch.stack([dt.weight.detach() for dt in dt_projs]))
        self.dt_projs_bias = nn.Parameter(torch.stack([dt.bias.detach() for dt in dt_projs]))


class SS2D(PathScans):
    """Project, convolve, scan along every path in one call, normalise, gate, project.

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
        self.paths, self.gated = paths, gated

        # Names, shapes and order are those of the published weights.
        self.add_scans(len(paths), inner, rank=math.ceil(dim / 16), state=state)
        if not gated:
            self.out_norm = Float32LayerNorm(inner)
        self.in_proj = nn.Linear(dim, (2 if gated else 1) * inner, bias=False)
        self.conv2d = MapConv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        if gated:
            self.out_norm = Float32LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self, x: Tensor, cells: Cells | None = None, want: frozenset[str] = frozenset()
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """Mix a map or kept cells of it.

        Each path reads the kept cells as they come on the map, as if none had been between.

        Args:
            x: (batch, height, width, dim), or (batch, kept, dim).
            cells: Where kept cells are.
            want: Fields of `Intermediates` to return, of `layers.tokens.STATE`.

        Returns:
            Shaped like x; if anything is wanted, also that.  Its directions are those of the paths,
            the one from each start before the one from its end.
        """
        u, projected, z = self.project(x, cells)
        if cells is None:
            order = scan_paths((x.shape[1], x.shape[2]), x.device, self.paths)
        else:
            order = cells.paths(self.paths)
        one = u.flatten(1, -2).unsqueeze(2)  # (batch, length, 1, inner), which every path reads
        y = scan_steps([self], one, to_steps(projected, order), order)
        out = self.finish(y.sum(dim=2), u, z)
        return (out, self._intermediates(projected, y, want)) if want else out

    def _intermediates(self, projected: Tensor, y: Tensor, want: frozenset[str]) -> Intermediates:
        """Return what is wanted of `projected`, as `project` returns it, and of the scans' y."""
        dt, B, C = projected.detach().split(self.splits, dim=3)
        known = {"B": B, "C": C}  # each (batch, length, paths, its width)
        if "delta" in want:
            delta = torch.einsum("blkr,kdr->blkd", dt, self.dt_projs_weight.detach())
            known["delta"] = F.softplus(upcast(delta) + upcast(self.dt_projs_bias.detach()))
        known |= {name: token_score(y, y, name)[..., None] for name in want & set(SCORES)}
        turns = sorted(
            range(len(self.paths)),
            key=lambda n: (self.paths[n].removeprefix("-"), self.paths[n].startswith("-")),
        )
        return Intermediates(**{name: known[name][:, :, turns].transpose(1, 2) for name in want})

    def project(
        self, x: Tensor, cells: Cells | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute what is scanned.

        Args:
            x: A map, (batch, height, width, dim), or kept cells, (batch, kept, dim).
            cells: Where those are.

        Returns:
            Inputs of the scan, (batch, height, width, inner) or (batch, kept, inner); step size, B
            and C of every path, (batch, length, paths, rank + 2 * state); and what gates, shaped
            like the inputs.
        """
        x = self.in_proj(x)
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        u = F.silu(self.conv2d(x) if cells is None else cells.convolve(self.conv2d, x))
        projected = F.linear(u.flatten(1, -2), self.x_proj_weight.flatten(0, 1))
        return u, projected.unflatten(2, (len(self.paths), -1)), z

    def finish(self, y: Tensor, u: Tensor, z: Tensor | None) -> Tensor:
        """Normalise, gate and project what was scanned.

        Args:
            y: Output of the scans, (batch, length, inner), in float32 or float64.
            u: What was scanned, as `project` returns it.
            z: What gates, likewise.

        Returns:
            Shaped like u, of width dim.
        """
        y = self.out_norm(y.view(u.shape)).to(u.dtype)
        out: Tensor = self.out_proj(y if z is None else y * F.silu(z))
        return out


def scan_groups(mixers: Sequence[SS2D], x: Tensor) -> Tensor:
    """Run mixers of one path each on equal shares of the channels, in one scan.

    Args:
        mixers: Of equal sizes.
        x: A map, (batch, height, width, len(mixers) * dim).

    Returns:
        Shaped like x; equal to the mixers' own outputs side by side.
    """
    shares = zip(mixers, x.chunk(len(mixers), dim=3), strict=True)
    us, projections, gates = zip(*(mixer.project(share) for mixer, share in shares), strict=True)
    names = tuple(mixer.paths[0] for mixer in mixers)
    order = scan_paths((x.shape[1], x.shape[2]), x.device, names)
    each = torch.stack(us, dim=3).flatten(1, 2)  # (batch, length, paths, inner)
    y = scan_steps(mixers, each, to_steps(torch.cat(projections, dim=2), order), order)
    results = zip(mixers, y.unbind(2), us, gates, strict=True)
    return torch.cat([mixer.finish(own, u, z) for mixer, own, u, z in results], dim=3)


def scan_steps(
    mixers: Sequence[PathScans], u: Tensor, projected: Tensor, order: Tensor | None = None
) -> Tensor:
    """Scan along the paths of mixers of equal sizes.

    Args:
        mixers: Their recurrences, path by path.
        u: Inputs, (batch, length, paths, inner), step by step without an order; with one by token,
            and 1 in place of paths if all read the same.
        projected: Step size, B and C of each step, (batch, length, paths, rank + 2 * state).
        order: Token of each step, (length, paths) as from `scan_paths`, or (batch, length, paths)
            as from `kept_paths`.  Narrow projections are cheaper to bring into it than the step
            sizes made of them.

    Returns:
        (batch, length, paths, inner), in the order of u, in float32 or float64.
    """
    dt, B, C = projected.split(mixers[0].splits, dim=3)  # each (batch, length, paths, its width)
    delta = torch.einsum("blkr,kdr->blkd", dt, _joined([m.dt_projs_weight for m in mixers]))
    y: Tensor = selective_scan(
        u.flatten(2).mT,  # (batch, paths * inner or inner, length)
        delta.flatten(2).mT,
        A_from_log(_joined([m.A_logs for m in mixers])),
        B.permute(0, 2, 3, 1),  # (batch, paths, state, length)
        C.permute(0, 2, 3, 1),
        upcast(_joined([m.Ds for m in mixers])),
        delta_bias=upcast(_joined([m.dt_projs_bias for m in mixers])).flatten(),
        delta_softplus=True,
        out_dtype=torch.promote_types(u.dtype, torch.float32),
        order=order,
        order_params=False,
    )
    out: Tensor = y.mT.unflatten(2, (projected.shape[2], -1))
    return out


def _joined(weights: list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(weights)
