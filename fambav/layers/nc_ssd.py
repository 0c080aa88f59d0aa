"""The non-causal mixer of VSSD: a map whose cells share one state.

    z, x, B, C, dt = in_proj(map)      x, B, C = silu(conv2d(x, B, C))
    y = nc_ssd(x, softplus(dt), A, B, C, D)
    out = out_proj(norm(y) * z)

Source: Shi et al., "VSSD", arXiv:2407.18559, section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.layers.cells import Cells
from fambav.layers.hierarchy import Float32LayerNorm, MapConv2d
from fambav.layers.mamba import A_from_log, init_dt_bias, upcast
from fambav.layers.tokens import Intermediates
from fambav.ops import nc_ssd
from fambav.ops.bimamba import token_score
from fambav.ops.fused_bimamba import SCORES

EXPAND = 2  # inner width, in units of that of a cell
A_MAX = 16.0  # decay rates of a new mixer are between 1 and this


class NonCausalSSD(nn.Module):
    """Project, convolve, sum into a state and read it, normalise, multiply by z, project.

    Args:
        dim: Width of a cell.
        heads: A divisor of EXPAND * dim; each has its own step sizes and decay rate.
        state: Width of the state of a head; B and C are those of all heads.
    """

    def __init__(self, dim: int, *, heads: int, state: int) -> None:
        super().__init__()
        inner, self.heads = EXPAND * dim, heads
        self.convolved_splits = (inner, state, state)  # x, B, C
        convolved = sum(self.convolved_splits)
        self.splits = (inner, convolved, heads)  # z, all of these, dt

        # Names, shapes and order are those of the published weights.
        self.dt_bias = nn.Parameter(init_dt_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1.0, A_MAX).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.in_proj = nn.Linear(dim, sum(self.splits), bias=False)
        self.conv2d = MapConv2d(convolved, convolved, 3, padding=1, groups=convolved)
        self.norm = Float32LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self, x: Tensor, cells: Cells | None = None, want: frozenset[str] = frozenset()
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """Mix a map or kept cells of it.

        A cell that is not kept has no weight in the state, and one that stands for n has n times
        its own: what the convolution gives it is the mean over its members.

        Args:
            x: (batch, height, width, dim), or (batch, kept, dim).
            cells: Where kept cells are.
            want: Fields of `Intermediates` to return, of `layers.tokens.STATE`.

        Returns:
            Shaped like x; if anything is wanted, also that, in one direction.
        """
        z, xBC, dt = self.in_proj(x).split(self.splits, dim=-1)
        dt = F.softplus(upcast(dt) + upcast(self.dt_bias))  # (batch, ..., heads), as x
        xBC = self.conv2d(xBC) if cells is None else cells.convolve(self.conv2d, xBC)
        x, B, C = F.silu(xBC).split(self.convolved_splits, dim=-1)
        y = nc_ssd(
            x.flatten(1, -2).unflatten(2, (self.heads, -1)),  # (batch, length, heads, head_dim)
            dt.flatten(1, -2),
            A_from_log(self.A_log),
            B.flatten(1, -2),
            C.flatten(1, -2),
            upcast(self.D),
            size=None if cells is None else cells.size,
        )
        y = y.flatten(2)  # (batch, length, inner)
        out: Tensor = self.out_proj(self.norm(y).to(z.dtype).view(z.shape) * z)
        if not want:
            return out
        known = {"delta": dt.flatten(1, -2), "B": B.flatten(1, -2), "C": C.flatten(1, -2)}
        known |= {name: token_score(y, y, name)[..., None] for name in want & set(SCORES)}
        return out, Intermediates(**{name: known[name].detach()[:, None] for name in want})
