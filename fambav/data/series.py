"""Time series in windows: what is seen, and what comes next.

file or made rows -> training, validation and test rows -> standardised by the former -> windows

The borders of the ETT sets are their published ones: 12, 4 and 4 months of 30 days.  Any other file
gives 70% of its rows to training and 20% to the test.  Windows of validation and test look back
over their border, so that every row behind it is forecast.

Source: the protocol of Informer, arXiv:2012.07436, as the Time-Series-Library carries it out.
"""

from __future__ import annotations

import csv
import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fambav.data.types import DataError, DataSet
from fambav.short_repr import short_repr

Values = NDArray[np.float64]

ETT = {"ETTh1": 1, "ETTh2": 1, "ETTm1": 4, "ETTm2": 4}  # rows in an hour
_MONTHS, _HOURS = (12, 16, 20), 30 * 24  # where parts of the ETT sets end; hours in a month


class Series(NamedTuple):
    """Rows of numbers.

    Attributes:
        source: Where they come from, for messages.
        variates: Names of the columns.
        values: (rows, variates).
        notes: Sentences for the log.
    """

    source: str
    variates: tuple[str, ...]
    values: Values
    notes: tuple[str, ...] = ()


class Windows:
    """All windows of some rows, one starting at each.

    Args:
        values: (rows, variates), float32.
        lookback: Rows that a forecast is made from.
        horizon: Rows that are forecast.
    """

    def __init__(self, values: Tensor, *, lookback: int, horizon: int) -> None:
        self.values, self.lookback, self.horizon = values, lookback, horizon

    def __len__(self) -> int:
        return len(self.values) - self.lookback - self.horizon + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the past, (lookback, variates), and the future, (horizon, variates)."""
        if not 0 <= index < len(self):  # without it a loop over windows would never end
            raise IndexError(f"index is {index}, expected one below {len(self)}")
        border = index + self.lookback
        return self.values[index:border], self.values[border : border + self.horizon]


@dataclass(frozen=True, kw_only=True)
class SeriesSet(DataSet):
    """Windows of a series; `num_classes` is the horizon, the length of a model's output.

    Attributes:
        variates: Names of the columns.
    """

    fewest: ClassVar[int] = 1
    variates: tuple[str, ...]

    def statistics(self, which: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each variate in the training rows."""
        del which  # there are no others
        return self.mean or (), self.std or ()

    def facts(self, which: str) -> dict[str, Any]:
        """Return what a checkpoint says of the set, also the names of its variates."""
        return {**super().facts(which), "variates": list(self.variates)}


def read_series(name: str, path: Path, *, lookback: int, horizon: int) -> SeriesSet:
    """Open a series in a file.

    Args:
        name: A name of `ETT`, or CSV.
        path: The file; for a set of `ETT` also the folder that it lies in.
        lookback: Rows that a forecast is made from.
        horizon: Rows that are forecast.

    Raises:
        DataError: If the file is missing or damaged, or too short.
    """
    file = path / f"{name}.csv" if name in ETT and path.suffix != ".csv" else path
    if not file.is_file():
        wanted = f"{name}.csv or the folder with it" if name in ETT else "a CSV file"
        raise DataError(f"data_path is {path}, expected {wanted}")
    series = read_csv(file)
    rows = len(series.values)
    ends = tuple(months * _HOURS * ETT[name] for months in _MONTHS) if name in ETT else parts(rows)
    if rows < ends[-1]:
        raise DataError(f"{file} has {rows} rows of numbers, expected the {ends[-1]} of {name}")
    return in_windows(name, series, ends, lookback=lookback, horizon=horizon)


def read_csv(path: Path) -> Series:
    """Read a header, whose first name is `date`, and a row of numbers for each time.

    Args:
        path: The file, in UTF-8, with commas.

    Raises:
        DataError: If it is of another form, or a cell is no finite number; it names the row.
    """
    numbers, dates = array("d"), list[str]()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            first, *variates = next(reader, None) or [""]
            if first.strip().lower() != "date" or not variates:
                raise DataError(
                    f"{path}: row 1 starts with {short_repr(first)}, expected a header of date and"
                    " the names of the variates, with commas between"
                )
            for cells in reader:
                numbers.extend(_numbers(path, reader.line_num, variates, cells))
                dates.append(cells[0])
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no text in UTF-8: {error.reason}, expected a CSV file"
        ) from None
    except csv.Error as error:
        raise DataError(f"{path}: row {reader.line_num} cannot be read: {error}") from None
    values = np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(variates))
    return Series(str(path), tuple(variates), values, _uneven(path, dates))


def _numbers(path: Path, row: int, variates: Sequence[str], cells: Sequence[str]) -> list[float]:
    """Return the numbers of a row behind its date."""
    if len(cells) != len(variates) + 1:
        wanted = f"{len(variates) + 1} as the header has"
        raise DataError(f"{path}: row {row} has {len(cells)} columns, expected {wanted}")
    try:
        numbers = list(map(float, cells[1:]))
    except ValueError:
        numbers = [math.nan]
    if "_" in "".join(cells[1:]) or not all(map(math.isfinite, numbers)):
        name, cell = next(pair for pair in zip(variates, cells[1:], strict=True) if _wrong(pair[1]))
        what = short_repr(cell) if cell.strip() else "empty"
        where = f"row {row}, column {short_repr(name)}"
        raise DataError(f"{path}: {where} is {what}, expected a finite number")
    return numbers


def _wrong(cell: str) -> bool:
    """Whether a cell holds no finite number; Python's own may have underscores."""
    try:
        return "_" in cell or not math.isfinite(float(cell))
    except ValueError:
        return True


def _uneven(path: Path, dates: Sequence[str]) -> tuple[str, ...]:
    """Return a note if dates in the ISO format are uneven; rows are taken as they are."""
    try:
        times = [datetime.fromisoformat(date) for date in dates]
        steps = [after - before for before, after in pairwise(times)]
    except (ValueError, TypeError):  # another format, or only some with a time zone
        return ()
    uneven = [row for row, step in enumerate(steps, start=3) if step != steps[0]]
    if not uneven:
        return ()
    return (f"{path}: {len(uneven)} uneven time steps, the first before row {uneven[0]}",)


def parts(rows: int) -> tuple[int, int, int]:
    """Return where training, validation and test rows end in a set of no published borders."""
    return int(0.7 * rows), rows - int(0.2 * rows), rows


def in_windows(
    name: str, series: Series, ends: tuple[int, ...], *, lookback: int, horizon: int
) -> SeriesSet:
    """Standardise a series by its training rows and cut its parts into windows.

    Args:
        name: One of `fambav.registry.DATA_SETS`.
        series: The rows.
        ends: Where training, validation and test rows end.
        lookback: Rows that a forecast is made from.
        horizon: Rows that are forecast.

    Raises:
        DataError: If a part has no window, or a variate cannot be standardised.
    """
    starts = (0, *(end - lookback for end in ends[:2]))
    pairs = list(zip(starts, ends, strict=True))
    for part, (start, end) in zip(("training", "validation", "test"), pairs, strict=True):
        most = end - start - lookback
        if horizon > most:
            what = f"horizon is {horizon} with a lookback of {lookback}"
            less = f"at most {most}" if most > 0 else "a shorter lookback"
            raise DataError(f"{what}, expected {less} for the {part} rows of {series.source}")
    values, mean, std = standardised(series, ends[0])
    train, choice, test = (
        Windows(values[start:end], lookback=lookback, horizon=horizon) for start, end in pairs
    )
    sha = hashlib.sha256(np.ascontiguousarray(series.values, dtype="<f8").data).hexdigest()
    note = (
        f"{name}: {len(series.variates)} variates; {len(train):,} windows to train, {len(choice):,}"
        f" to choose the best epoch and {len(test):,} held out, sha256 {sha[:16]}"
    )
    return SeriesSet(
        name=name,
        train=train,
        val=test,
        choice=choice,
        num_classes=horizon,
        variates=series.variates,
        mean=mean,
        std=std,
        notes=(note, *series.notes),
        digest=sha,
    )


def standardised(series: Series, train: int) -> tuple[Tensor, tuple[float, ...], tuple[float, ...]]:
    """Return (x - mean) / std of each variate, float32, and both, of the first `train` rows.

    Raises:
        DataError: If a variate is constant there, or a number is too large.
    """
    rows = series.values[:train]
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = rows.mean(axis=0), rows.std(axis=0)
        scaled = ((series.values - mean) / np.where(std > 0, std, 1)).astype(np.float32)
    for column, variate in enumerate(series.variates):
        where = f"{series.source}: column {short_repr(variate)}"
        if not std[column] > 0 or (rows[:, column] == rows[0, column]).all():
            raise DataError(
                f"{where} is {rows[0, column]:g} in all training rows, 2 to {train + 1}, expected a"
                " variate that is not constant; take it out of the file"
            )
        if not np.isfinite(scaled[:, column]).all():
            row = int(np.argmin(np.isfinite(scaled[:, column])))
            value = series.values[row, column]
            raise DataError(f"{where} is {value:g} in row {row + 2}, expected a smaller number")
    return torch.from_numpy(scaled), tuple(mean.tolist()), tuple(std.tolist())
