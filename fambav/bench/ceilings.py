"""What a device does at best here and now: a large product in each dtype, and a large copy.

Both take their turns in the same rounds as what is set beside them, so that a machine that is slow
in a round is slow for both.  Products are made as torch is set to: in float32 a GPU may use TF32.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fambav.bench.counts import traffic
from fambav.bench.report import Row, short
from fambav.engine.memory import MIB
from fambav.engine.timing import Run, Times, ratio, spread

SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices multiplied
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes

Key = tuple[str, str]
_COPY: Key = ("ceiling", "copy")


class Ceilings:
    """Large products and a large copy, to be timed beside others.

    Args:
        device: Where.
        dtypes: Of the products; without any there are no ceilings.
    """

    def __init__(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
        self._side, self._copied = SIDE[device.type], COPIED[device.type]
        self._runs: dict[Key, Run] = {}
        for dtype in dtypes:
            shape = self._side, self._side
            left, right = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            self._runs[self._product(dtype)] = partial(torch.matmul, left, right)
        if dtypes:
            source = torch.empty(self._copied, dtype=torch.uint8, device=device).random_()
            self._runs[_COPY] = partial(torch.empty_like(source).copy_, source)

    def runs(self) -> dict[Key, Run]:
        """Return what is to be timed, by keys of its own."""
        return self._runs

    def tables(self, times: Mapping[Any, Times]) -> dict[str, tuple[Row, ...]]:
        """Return a table with a row for each ceiling; no table if there are none.

        Args:
            times: Of `runs`, in milliseconds.
        """
        rows: tuple[Row, ...] = tuple(
            {
                "what": key[1],
                **spread(times[key]),
                "giga_per_s": self._amount(key) / statistics.median(times[key]) / 1e6,
                "of": "bytes read or written" if key == _COPY else "operations",
            }
            for key in self._runs
        )
        return {"ceilings": rows} if rows else {}

    def bytes_per_s(self, times: Mapping[Any, Times]) -> float:
        """Return what the copy reads and writes in a second."""
        return 2 * self._copied / statistics.median(times[_COPY]) * 1000

    def flops_per_s(self, times: Mapping[Any, Times], dtype: torch.dtype) -> float:
        """Return what the product does in a second, a multiply-add being two operations."""
        return 2 * self._side**3 / statistics.median(times[self._product(dtype)]) * 1000

    def beside(
        self,
        times: Mapping[Any, Times],
        own: Hashable,
        dtype: torch.dtype,
        *,
        batch: int,
        flops: float,
        run: Run,
    ) -> dict[str, Any]:
        """Return operations in a second and, if there are ceilings, shares of them.

        Args:
            times: Of `runs` and of a candidate.
            own: Key of the candidate.
            dtype: Of the product that it is set beside.
            batch: Images of one run.
            flops: Operations for one image.
            run: Does what the candidate does, and may be watched while it does.

        Returns:
            gflop_per_image, gflop_per_s, and with ceilings the bytes of a run as `counts.traffic`
            counts them, gbyte_per_s, and flops_share and bytes_share of the ceilings, taken within
            each round.
        """
        second = statistics.median(times[own]) / 1000
        row = {"gflop_per_image": flops / 1e9, "gflop_per_s": batch * flops / second / 1e9}
        if not self._runs:
            return row
        moved = traffic(run)
        made, copied = (ratio(times[k], times[own]) for k in (self._product(dtype), _COPY))
        return {
            **row,
            "mib_moved": moved / MIB,
            "gbyte_per_s": moved / second / 1e9,
            "flops_share": batch * flops / self._amount(self._product(dtype)) * (made or 0),
            "bytes_share": moved / self._amount(_COPY) * (copied or 0),
        }

    def _amount(self, key: Key) -> float:
        return 2 * self._copied if key == _COPY else 2 * self._side**3

    @staticmethod
    def _product(dtype: torch.dtype) -> Key:
        return "ceiling", f"product in {short(dtype)}"
