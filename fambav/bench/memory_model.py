"""What the peak memory of training is made of, fitted to what was measured.

    peak = constant + a * tokens over all mixers + b * tokens that the layers that fuse receive

`a` is what a mixer keeps for each token, `b` what fusing adds for each token that it looks at: a
layer that fuses pays as soon as it has removed b / a of its tokens from every layer from it up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fambav.bench.report import Row
from fambav.reduction import Schedule


class Fit(NamedTuple):
    """A model of memory by least squares.

    Attributes:
        constant: MiB that do not depend on tokens.
        mixing: MiB for each token that a mixer sees.
        fusing: MiB for each token that a layer that fuses receives.
        residuals: Measured less fitted for each plan, in MiB.
    """

    constant: float
    mixing: float
    fusing: float
    residuals: tuple[float, ...]

    @property
    def rms(self) -> float:
        """Root of the mean square of the residuals, in MiB."""
        return math.sqrt(sum(r * r for r in self.residuals) / len(self.residuals))

    @property
    def worst(self) -> float:
        """Largest residual, in MiB."""
        return max(map(abs, self.residuals))

    def row(self, largest: float) -> Row:
        """Return all of it; residuals also as shares of the largest peak, in MiB."""
        return {
            "plans": len(self.residuals),
            "constant_mib": self.constant,
            "mixing_kib_per_token": 1024 * self.mixing,
            "fusing_kib_per_token": 1024 * self.fusing,
            "rms_mib": self.rms,
            "worst_mib": self.worst,
            "rms_share": self.rms / largest,
        }


def tokens(schedule: Schedule) -> tuple[int, int]:
    """Return the tokens summed over all mixers, and over the layers that fuse, before they do."""
    counts, seen = schedule.counts, schedule.lengths
    gone = 0 if schedule.after else 1
    met = sum(n + gone * count for n, count in zip(seen, counts, strict=True) if count)
    return sum(seen), met


def fit(schedules: Sequence[Schedule], peaks: Sequence[float]) -> Fit | None:
    """Fit peaks of memory, in MiB, to the tokens of each plan.

    Returns:
        The model; None if the plans do not tell its three numbers apart, with one to spare.
    """
    rows = [(1.0, *map(float, tokens(schedule))) for schedule in schedules]
    seen, wanted = torch.tensor(rows, dtype=torch.float64), torch.tensor(peaks, dtype=torch.float64)
    if len(rows) < 4 or int(torch.linalg.matrix_rank(seen)) < 3:
        return None
    # By an orthogonal basis, since tokens are thousands and the first column is 1.
    basis, triangle = torch.linalg.qr(seen)
    found = torch.linalg.solve_triangular(triangle, (basis.mT @ wanted)[:, None], upper=True)[:, 0]
    constant, mixing, fusing = found.tolist()
    return Fit(constant, mixing, fusing, tuple((wanted - seen @ found).tolist()))
