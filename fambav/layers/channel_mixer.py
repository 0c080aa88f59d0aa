"""The selective channel mixer of ViM2: in each cell of a map, a scan along its channels.

    value, z = in_proj(cell)                                                       each (width,)
    x = value as a sequence of steps, and the same sequence from its end         (steps, 2, step)
    u = silu(conv1d(x))                                                causal, along the steps
    of each direction:  dt, B, C = x_proj(u)      y = scan(u, softplus(dt_proj(dt)), A, B, C, D)
    out = out_proj(norm(y of the one + y of the other, from its end) * silu(z))

A cell does not see its neighbours, so that no weight depends on how many there are.

Source: Behrouz et al., "MambaMixer", arXiv:2403.19888, selective channel mixer; no code is public,
and docs/vim2.md lists what is chosen here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.layers.hierarchy import Float32LayerNorm
from fambav.layers.ss2d import PathScans, scan_steps
from fambav.ops import causal_conv1d

STEP = 16  # channels of a step
DIRECTIONS = 2  # from the first channels to the last, and back


class ChannelMixer(PathScans):
    """Project each cell, scan along its channels both ways in one call, normalise, gate, project.

    The directions have their own convolution, projections, A, D and step size.

    Args:
        dim: Width of a cell.
        width: Inner width, a multiple of `STEP`.
        state: Numbers of state per channel.
        kernel: Length of the convolution, in steps.
        gated: Multiply by silu(z) behind the norm.

    Raises:
        ValueError: If width is no multiple of `STEP`.
    """

    def __init__(
        self, dim: int, width: int, *, state: int = 16, kernel: int = 4, gated: bool = True
    ) -> None:
        super().__init__()
        if width < 1 or width % STEP:
            raise ValueError(
                f"width of a channel mixer is {width}, expected a multiple of {STEP}, the channels"
                " of a step"
            )
        self.gated = gated

        self.in_proj = nn.Linear(dim, (2 if gated else 1) * width, bias=False)
        bound = kernel**-0.5  # of torch's depthwise convolutions
        conv = torch.empty(DIRECTIONS * STEP, kernel)
        self.conv_weight = nn.Parameter(conv.uniform_(-bound, bound))
        self.add_scans(DIRECTIONS, STEP, rank=math.ceil(STEP / 16), state=state)
        self.out_norm = Float32LayerNorm(width)
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of each cell, (batch, height, width, dim); the shape stays."""
        x = self.in_proj(x)
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        steps = x.flatten(0, 2).unflatten(1, (-1, STEP))  # (cells, steps, STEP)
        y = self._scan(torch.cat((steps, steps.flip(1)), dim=2))
        forward, backward = y.unbind(2)  # each (cells, steps, STEP)
        y = (forward + backward.flip(1)).reshape(x.shape)
        y = self.out_norm(y).to(x.dtype)
        out: Tensor = self.out_proj(y if z is None else y * F.silu(z))
        return out

    def _scan(self, x: Tensor) -> Tensor:
        """Convolve and scan both directions, (cells, steps, 2 * STEP), each in its own order.

        Returns:
            (cells, steps, 2, STEP), in float32 or float64.
        """
        u = causal_conv1d(x.mT, self.conv_weight, None, "silu").mT
        u = u.unflatten(2, (DIRECTIONS, STEP))
        return scan_steps([self], u, torch.einsum("csnd,nrd->csnr", u, self.x_proj_weight))
