"""WAVES, a made series in which one variate leads another.

Random waves are seen offshore, reach a reef after a lag, and have nothing to do with those in a
harbour.  Nothing in the reef's own past says what comes to it; what was seen offshore does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fambav.data.series import Series, SeriesSet, in_windows
from fambav.data.synthetic import CounterRNG

Ints = NDArray[np.int64]

LAG = 48  # rows from offshore to the reef
_ENDS = (24_000, 25_200, 27_600)  # where training, validation and test rows end
_SMOOTH = 8  # random numbers that a row is the sum of


class Wave(NamedTuple):
    """A variate."""

    source: int  # of its random numbers
    delay: int  # rows by which they come later
    noise: int  # 1 with another random number in each row


WAVES = {"offshore": Wave(0, 0, 0), "reef": Wave(0, LAG, 1), "harbour": Wave(1, 0, 0)}


def waves(*, lookback: int, horizon: int) -> SeriesSet:
    """Make the series, by integer arithmetic on hashed counters: the same on every machine.

    Args:
        lookback: Rows that a forecast is made from.
        horizon: Rows that are forecast.

    Raises:
        DataError: If a part of the rows has no window.
    """
    drawn = CounterRNG("waves", np.arange(_ENDS[-1] + LAG + _SMOOTH)).triangular(4).astype(np.int64)
    sums = drawn.cumsum(axis=0)
    smooth = sums[_SMOOTH:] - sums[:-_SMOOTH]  # (rows + LAG, 4)
    columns = [
        smooth[LAG - wave.delay :][: _ENDS[-1], wave.source] + wave.noise * drawn[: _ENDS[-1], 2]
        for wave in WAVES.values()
    ]
    series = Series("WAVES", tuple(WAVES), np.stack(columns, axis=1).astype(np.float64))
    return in_windows("WAVES", series, _ENDS, lookback=lookback, horizon=horizon)


def waves_floor(lookback: int, horizon: int, *, together: bool) -> float:
    """Return the expected MSE of the best linear forecast of WAVES, in units of variance.

    With covariances S of the past, c of past and future value and v of the value: v - c' S^-1 c.

    Args:
        lookback: Rows that the forecast is made from.
        horizon: Rows that are forecast.
        together: Whether it is made from all variates, or of each by itself.
    """
    names = list(WAVES)
    past, future = np.arange(lookback), np.arange(lookback, lookback + horizon)
    errors = []
    for name in names:
        seen = names if together else [name]
        inner = np.block([[_covariance(a, b, past, past) for b in seen] for a in seen])
        outer = np.concatenate([_covariance(other, name, past, future) for other in seen])
        variance = _SMOOTH + WAVES[name].noise
        known = (outer * np.linalg.solve(inner, outer)).sum(axis=0)  # (horizon,)
        errors.append(1 - known / variance)
    return float(np.mean(errors))


def _covariance(one: str, other: str, times: Ints, others: Ints) -> NDArray[Any]:
    """Return the covariance of two variates at all pairs of times, in units of a number's."""
    a, b = WAVES[one], WAVES[other]
    apart = (times - a.delay)[:, None] - (others - b.delay)
    shared = np.maximum(_SMOOTH - abs(apart), 0) * (a.source == b.source)
    both: NDArray[Any] = shared + a.noise * ((apart == 0) & (one == other))
    return both
