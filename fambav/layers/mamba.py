"""The Mamba mixer over a sequence, in one direction or both.

    x, z = in_proj(hidden)
    u = silu(conv(x))      dt, B, C = x_proj(u)      y = scan(u, softplus(dt_proj(dt)), A, B, C, D)
    out = out_proj((y + y of the other direction) * silu(z))

Source: Gu and Dao, "Mamba", arXiv:2312.00752, figure 3 and algorithm 2; Zhu et al., "Vision Mamba",
arXiv:2401.09417, algorithm 1.
"""

from __future__ import annotations

import math
from typing import cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.layers.tokens import Ask, Signals
from fambav.ops import Direction, bimamba_scan
from fambav.ops.aligned_scan import aligned_scan, skipped, steps_between
from fambav.ops.bimamba import ScanInputs, directed_scan, scan_inputs
from fambav.registry import BIMAMBA, nearest

DT_MIN, DT_MAX = 1e-3, 0.1  # step sizes that a new mixer starts from


class Mamba(nn.Module):
    """Project, scan, gate, project.

    Everything between the projections is (batch, length, dim) in memory, and the backward direction
    is a scan from the last token to the first: no sequence is copied to be reversed. Both
    directions share the gate, which is therefore applied once, to their sum.

    Args:
        dim: Width of a token.
        bimamba_type: "v2", two directions with their own convolution, projections and D; "v1", two
            directions that differ in A only; "none", forward only.
        divide_out: Halve the sum of both directions; v2 only.
        state: Numbers of state per channel.
        kernel: Length of the convolution.
        expand: Inner width, in units of dim.
        depth: Mixers that add to one residual stream; the last projection starts smaller by its
            square root.
        legacy_init: Start the backward dt bias of v2 at the published zero, which is a step 7 to
            700 times the forward direction's, instead of drawing it as the forward one.

    Raises:
        ValueError: If bimamba_type is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        bimamba_type: str = "v2",
        divide_out: bool = True,
        state: int = 16,
        kernel: int = 4,
        expand: int = 2,
        depth: int = 1,
        legacy_init: bool = False,
    ) -> None:
        super().__init__()
        if bimamba_type not in BIMAMBA:
            hint = nearest(bimamba_type, BIMAMBA)
            raise ValueError(f"bimamba_type is {bimamba_type!r}, expected a known mixer; {hint}")
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.bimamba_type = bimamba_type
        self.halved = divide_out and bimamba_type == "v2"
        self.splits = (rank, state, state)

        # Names and order are those of the published weights.
        self.A_log = decay_rates(inner, state)
        self.D = nn.Parameter(torch.ones(inner))
        if bimamba_type != "none":
            self.A_b_log = decay_rates(inner, state)
        if bimamba_type == "v2":
            self.D_b = nn.Parameter(torch.ones(inner))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = step_sizes(rank, inner)
        if bimamba_type == "v2":
            self.conv1d_b = nn.Conv1d(inner, inner, kernel, groups=inner)
            self.x_proj_b = nn.Linear(inner, sum(self.splits), bias=False)
            self.dt_proj_b = step_sizes(rank, inner)
            if legacy_init:
                nn.init.zeros_(self.dt_proj_b.bias)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= depth**0.5

    @overload
    def forward(self, hidden: Tensor, ask: None = ...) -> Tensor: ...

    @overload
    def forward(self, hidden: Tensor, ask: Ask) -> tuple[Tensor, Signals]: ...

    def forward(self, hidden: Tensor, ask: Ask | None = None) -> Tensor | tuple[Tensor, Signals]:
        """Mix along length.

        Args:
            hidden: (batch, length, dim).
            ask: Where the tokens come from and what to tell of them. Whoever asks gets the mixer
                composed of single scans, which costs more than the fused one.

        Returns:
            Shaped like hidden; with `ask` also what was asked for.
        """
        xz = self.in_proj(hidden)
        directions = self._directions()
        if ask is None and self.bimamba_type == "v2":
            forward, backward = directions
            scale = 0.5 if self.halved else 1.0
            return bimamba_scan(xz, forward, backward, self.out_proj.weight, scale=scale)
        x, z = xz.chunk(2, dim=-1)
        inputs = [
            scan_inputs(x, direction, reverse=bool(end))
            for end, direction in enumerate(directions[: 2 if self.bimamba_type == "v2" else 1])
        ]
        inputs *= len(directions) // len(inputs)  # v1 scans the same both ways
        if ask is None:
            scanned = zip(inputs, directions, strict=True)
            ys = [directed_scan(i, d, reverse=bool(end)) for end, (i, d) in enumerate(scanned)]
        else:
            ys, told = _told(inputs, directions, ask)
        out: Tensor = self.out_proj(sum(ys[1:], ys[0]) * self._gate(z))
        if ask is None:
            return out
        told |= {"z": z, "mixed": out}
        wanted = {name: tensor for name, tensor in told.items() if name in ask.needs}
        return out, Signals(order=_order(hidden, len(directions)), **wanted)

    def _directions(self) -> tuple[Direction, ...]:
        """Return the parameters of each direction."""
        forward = _direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        if self.bimamba_type == "none":
            return (forward,)
        if self.bimamba_type == "v1":
            return forward, forward._replace(A=rates(self.A_b_log))
        backward = _direction(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        return forward, backward

    def _gate(self, z: Tensor) -> Tensor:
        return F.silu(z) * 0.5 if self.halved else F.silu(z)


def _told(
    inputs: list[ScanInputs], directions: tuple[Direction, ...], ask: Ask
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Scan each direction over tokens of which some may be gone.

    Returns:
        What each scan gives, (batch, length, inner), and the signals of all, stacked.
    """
    ys, told = [], []
    for end, ((u, delta, B, C), direction) in enumerate(zip(inputs, directions, strict=True)):
        delta = F.softplus(wide(delta) + direction.dt_bias)
        gap = _gap(ask, delta, direction.dt_bias, end)
        A, D = direction.A, direction.D
        ys.append(aligned_scan(u, delta, A, B, C, D, gap, reverse=bool(end)))
        told.append({"u": u, "delta": delta, "B": B, "C": C, "y": ys[-1]})
    stacked = {name: [one[name] for one in told] for name in told[0] if name in ask.needs}
    return ys, {name: torch.stack(tensors, dim=1) for name, tensors in stacked.items()}


def _gap(ask: Ask, delta: Tensor, bias: Tensor, end: int) -> Tensor | None:
    """Return the step sizes of what is gone before each token; None for none."""
    tokens = ask.tokens
    if ask.gap is None:
        return None
    if ask.gap == "cached":
        return None if tokens.gap is None else tokens.gap[:, end]
    absent = skipped(tokens.position, reverse=bool(end))
    return steps_between(ask.gap, delta=delta, skipped=absent, bias=bias, reverse=bool(end))


def _order(hidden: Tensor, directions: int) -> Tensor:
    """Return in which order the tokens are scanned, (1, directions, length)."""
    forward = torch.arange(hidden.shape[1], device=hidden.device)
    return torch.stack((forward, forward.flip(0))[:directions])[None]


def _direction(
    conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor
) -> Direction:
    """Collect the parameters of one direction."""
    return Direction(
        conv_weight=conv.weight[:, 0],
        conv_bias=cast(Tensor, conv.bias),
        x_proj=x_proj.weight,
        dt_proj=dt_proj.weight,
        dt_bias=wide(dt_proj.bias),
        A=rates(A_log),
        D=wide(D),
    )


def rates(A_log: Tensor) -> Tensor:
    """Return A from the logarithm of its negative."""
    return -wide(A_log).exp()


def wide(parameter: Tensor) -> Tensor:
    """Give a parameter of the scan the dtype of the state, whatever that of the tokens is."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def decay_rates(inner: int, state: int) -> nn.Parameter:
    """Logarithms of 1 .. state for each channel, (inner, state)."""
    return nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))


def step_sizes(rank: int, inner: int) -> nn.Linear:
    """Map to steps that start, after softplus, evenly spread in log from DT_MIN to DT_MAX."""
    linear = nn.Linear(rank, inner)
    nn.init.uniform_(linear.weight, -(rank**-0.5), rank**-0.5)
    with torch.no_grad():
        dt = torch.empty(inner).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        linear.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
    return linear
