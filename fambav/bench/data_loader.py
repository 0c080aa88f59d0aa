"""Training images a second, from loader processes and from a device-resident set."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fambav import data
from fambav.bench.report import Report, Row, positive, settings
from fambav.bench.timing import quartiles, settle
from fambav.data.device_augment import DeviceSet, device_train_loader
from fambav.layers.embed import pair

BATCH = {"cuda": 128, "cpu": 32}
LOADER, RESIDENT = "loader", "resident"


def loading(
    *,
    data_set: str = "DIGITS",
    data_path: str | Path = "datasets",
    input_size: int | Sequence[int] = 224,
    batch: int | None = None,
    workers: Sequence[int] = (0, 1, 2),
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
        input_size: Height and width of the result, in pixels; one number for a square.
        workers: Numbers of loader processes; 0 reads in this one.
        batches: Batches that each process makes in a round.

    Returns:
        A row for every way and number of processes.

    Raises:
        DataError: If the data is missing.
        ValueError: If a number is too small, or the set has no full batch.
    """
    batch = BATCH[device.type] if batch is None else batch
    size = pair(input_size, name="input_size")
    positive(batch=batch, batches=batches, rounds=rounds)
    for name, value in (("workers", min(workers, default=-1)), ("warmup", warmup)):
        if value < 0:
            raise ValueError(f"{name} is {value}, expected at least 0")
    loaded = data.load(data_set, data_path, image_size=size)
    options: dict[str, Any] = dict(batch_size=batch, seed=0, pin_memory=device.type == "cuda")
    transform = data.train_transform(input_size=size)
    ways: dict[str, Callable[..., Any]] = {
        LOADER: partial(data.train_loader, loaded.train, transform, **options)
    }
    skipped = {}
    try:
        resident = DeviceSet(loaded.train, device=device)
        ways[RESIDENT] = partial(device_train_loader, resident, transform, **options)
    except ValueError as error:
        skipped[RESIDENT] = str(error)
    rates = {
        (way, count): _rates(
            make, count, each=batches, rounds=rounds, warmup=warmup, batch=batch, device=device
        )
        for way, make in ways.items()
        for count in dict.fromkeys(workers)
    }
    shown = size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}"
    about: dict[str, Any] = dict(data=data_set, input_size=shown, batch=batch, rounds=rounds)
    rows = [_row(*key, own, rates.get((LOADER, 1))) for key, own in rates.items()]
    title = "training images, read and augmented"
    return Report(title=title, settings=settings(device, **about), rows=rows, skipped=skipped)


def _rates(
    make: Callable[..., Any],
    workers: int,
    *,
    each: int,
    rounds: int,
    warmup: int,
    batch: int,
    device: torch.device,
) -> list[float]:
    """Return images a second in every round, in which each process makes `each` batches."""
    processes = max(1, workers)
    each *= processes
    # Processes take long to start, so each makes a batch before any round.
    first = processes + warmup * each
    epochs = -(-(first + rounds * each) // make(epochs=1).updates_per_epoch)
    rates = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        stream: Any = iter(make(epochs=epochs, workers=workers))

        def read(count: int) -> None:
            for _ in range(count):
                for tensor in next(stream):
                    tensor.to(device, non_blocking=True)
            settle(device)

        with closing(stream):
            read(first)
            for _ in range(rounds):
                start = time.perf_counter()
                read(each)
                rates.append(each * batch / (time.perf_counter() - start))
    return rates


def _row(way: str, workers: int, own: list[float], one: list[float] | None) -> Row:
    """Make a row; `over_one_worker` is the ratio of medians."""
    low, median, high = quartiles(own)
    return {
        "way": way,
        "workers": workers,
        "images_per_s": median,
        "quartiles_per_s": (low, high),
        "per_worker": median / max(1, workers),
        "over_one_worker": None if one is None else median / quartiles(one)[1],
    }
