"""Training images a second, from loader processes and from a set that lives on the device."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fambav import data
from fambav.bench.report import Report, Row, settings
from fambav.bench.scan import positive
from fambav.data.resident import Resident, resident_train_loader
from fambav.engine.timing import quartiles

WORKERS = (0, 1, 2)
BATCH = {"cuda": 128, "cpu": 32}
LOADER, RESIDENT = "loader", "resident"


class Stream(NamedTuple):
    """Batches that are timed.

    Attributes:
        make: Returns a loader, given `epochs` and `workers`.
        workers: Processes that read or draw ahead.
    """

    make: Callable[..., Any]
    workers: int

    @property
    def beats(self) -> int:
        """How many processes work."""
        return max(1, self.workers)


def loading(
    *,
    data_set: str = "DIGITS",
    data_path: str | Path = "datasets",
    input_size: int = 224,
    batch: int | None = None,
    workers: Sequence[int] = WORKERS,
    batches: int = 2,
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device,
) -> Report:
    """Measure the published augmentation of a training set, until the batch is on the device.

    Loaders are measured one after the other, since each reads ahead while another is measured.

    Args:
        data_set: Name of the set.
        data_path: Its folder.
        input_size: Height and width of the result, in pixels.
        batch: Images in a batch; by default 128 on a GPU and 32 on a CPU.
        workers: Numbers of loader processes; 0 reads in this one.
        batches: What each process makes in a round.
        rounds: How often each number is timed, at least 1.
        warmup: Rounds before those.
        device: Where batches go.

    Returns:
        A row for every way and number of processes.

    Raises:
        DataError: If the data is missing.
        ValueError: If a number is too small, or the set has no full batch.
    """
    batch = BATCH[device.type] if batch is None else batch
    positive(batch=batch, input_size=input_size, batches=batches, rounds=rounds)
    for name, value in (("workers", min(workers, default=-1)), ("warmup", warmup)):
        if value < 0:
            raise ValueError(f"{name} is {value}, expected at least 0")
    found = data.load(data_set, data_path, image_size=input_size)
    makers, skipped = _makers(found, input_size=input_size, batch=batch, device=device)
    rates = {
        (way, count): _rates(
            Stream(make, count), batch, batches=batches, rounds=rounds, warmup=warmup, device=device
        )
        for way, make in makers.items()
        for count in dict.fromkeys(workers)
    }
    return Report(
        title="training images, read and augmented",
        settings=settings(
            device, data=found.name, input_size=input_size, batch=batch, rounds=rounds
        ),
        rows=_rows(rates),
        skipped=skipped,
    )


def _makers(
    found: data.DataSet, *, input_size: int, batch: int, device: torch.device
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Return what makes a loader, by its name, and why one cannot be had."""
    options: dict[str, Any] = dict(batch_size=batch, seed=0, pin_memory=device.type == "cuda")
    transform = data.train_transform(input_size=input_size)
    makers: dict[str, Callable[..., Any]] = {
        LOADER: partial(data.train_loader, found.train, transform, **options)
    }
    try:
        resident = Resident(found.train, device=device)
    except ValueError as error:
        return makers, {RESIDENT: str(error)}
    makers[RESIDENT] = partial(resident_train_loader, resident, transform, **options)
    return makers, {}


def _rates(
    stream: Stream, batch: int, *, batches: int, rounds: int, warmup: int, device: torch.device
) -> list[float]:
    """Return images a second in every round."""
    each = batches * stream.beats
    # Processes take long to start, so each makes a batch before any round.
    first = stream.beats + warmup * each
    per_epoch = stream.make(epochs=1).updates_per_epoch
    epochs = -(-(first + rounds * each) // per_epoch)
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        made: Any = iter(stream.make(epochs=epochs, workers=stream.workers))
        with closing(made):
            _take(made, first, device)
            for _ in range(rounds):
                start = time.perf_counter()
                _take(made, each, device)
                found.append(each * batch / (time.perf_counter() - start))
    return found


def _take(made: Iterator[Any], count: int, device: torch.device) -> None:
    """Bring batches to the device and wait for them."""
    for _ in range(count):
        for tensor in next(made):
            tensor.to(device, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rows(rates: dict[tuple[str, int], list[float]]) -> tuple[Row, ...]:
    """Make rows; `over_one_worker` is the ratio of medians."""
    one = rates.get((LOADER, 1))
    rows = []
    for (way, workers), own in rates.items():
        low, median, high = quartiles(own)
        rows.append(
            {
                "way": way,
                "workers": workers,
                "images_per_s": median,
                "quartiles_per_s": (low, high),
                "per_worker": median / max(1, workers),
                "over_one_worker": None if one is None else median / quartiles(one)[1],
            }
        )
    return tuple(rows)
