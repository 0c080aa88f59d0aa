"""The data set of a configuration, and its batches on their way to the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fambav import data
from fambav.config import Config
from fambav.data import DataSet, EvalBatchesLoader, Samples, TrainBatchesLoader
from fambav.data.device_augment import DeviceEvalLoader, DeviceSet, device_train_loader
from fambav.engine.console import Console
from fambav.engine.distributed import Processes
from fambav.tasks import ClassMeter, Meter, Statistics, task_of

_REPEATS = 3  # views of an image in an epoch of repeated augmentation
_FAKE_CLASSES = 1000  # of random images, as in ImageNet
_EVAL_BATCH = 1.5  # evaluation needs no gradients, so more images fit


def data_set(config: Config, group: Processes, *, input_size: tuple[int, int]) -> DataSet:
    """Open the data set; with --download, one process fetches it first.

    Raises:
        DataError: If the data is missing or damaged.
        ValueError: If --num-classes is another number than the set has.
    """
    settings, root, classes = config.data, Path(config.data.data_path), config.model.num_classes
    if settings.download:
        if group.main:
            data.fetch(settings.data_set, root)
        group.wait()
    opened = data.load(
        settings.data_set,
        root,
        inat_category=settings.inat_category,
        classes=_FAKE_CLASSES if classes is None else classes,
        image_size=input_size,
        lookback=config.model.lookback,
        horizon=config.model.horizon,
        seed=config.run.seed,
    )
    if classes not in (None, opened.num_classes):
        wanted = f"{opened.num_classes}, the classes of {opened.name}"
        raise ValueError(f"num_classes is {classes}, expected {wanted}")
    return opened


def train_batches(
    config: Config,
    opened: DataSet,
    group: Processes,
    *,
    input_size: tuple[int, int],
    start_update: int | None = None,
    start_epoch: int = 0,
) -> TrainBatchesLoader:
    """Return this process's share of the batches that are left of the run.

    Args:
        config: The settings.
        opened: The data set.
        group: The processes.
        input_size: Height and width, in pixels.
        start_update: Updates that are done; None for those of `start_epoch` epochs.
        start_epoch: Epochs that are done.
    """
    make: Callable[..., TrainBatchesLoader]
    task = task_of(config.data.data_set)
    if config.augment.gpu_augment:
        make = partial(device_train_loader, DeviceSet(opened.train, device=group.device))
    else:
        readable = _readable(config, opened.train, replacing=True)
        make = partial(data.train_loader, readable, collate_fn=task.collate)
    statistics = opened.statistics(config.data.data_stats)
    make = partial(
        make,
        task.train_transform(config, statistics, input_size),
        batch_size=config.optim.batch_size,
        seed=config.run.seed,
        epochs=config.optim.epochs,
        accum=config.optim.grad_accum_steps,
        repeats=_REPEATS if config.augment.repeated_aug else 1,
        rank=group.rank,
        world=group.world,
        **_workers(config, group),
    )
    loader = make()
    start = start_epoch * loader.updates_per_epoch if start_update is None else start_update
    return make(start_update=start) if start else loader


def eval_batches(
    config: Config,
    opened: DataSet,
    group: Processes,
    *,
    input_size: tuple[int, int],
    statistics: Statistics | None = None,
    samples: Samples | None = None,
) -> EvalBatchesLoader | DeviceEvalLoader:
    """Return this process's share of the held-out samples.

    Args:
        config: The settings.
        opened: The data set.
        group: The processes.
        input_size: Height and width, in pixels.
        statistics: Mean and standard deviation of the channels, instead of those of --data-stats.
        samples: Of the set, instead of the held-out ones.
    """
    samples = opened.val if samples is None else samples
    statistics = statistics or opened.statistics(config.data.data_stats)
    transform = eval_transform(config, statistics, input_size)
    share: dict[str, Any] = dict(
        batch_size=int(_EVAL_BATCH * config.optim.batch_size) if opened.uniform else 1,
        rank=group.rank,
        world=group.world,
    )
    if config.augment.gpu_augment:
        return DeviceEvalLoader(DeviceSet(samples, device=group.device), transform, **share)
    readable = _readable(config, samples, replacing=False)
    share["collate_fn"] = task_of(config.data.data_set).collate
    return data.eval_loader(readable, transform, **share, **_workers(config, group))


def meter(
    config: Config, opened: DataSet, device: torch.device, *, by_class: bool = False
) -> Meter:
    """Return an empty meter of the task.

    Args:
        config: The settings.
        opened: The data set.
        device: Where the sums are kept.
        by_class: Count by class, of a task that has classes.
    """
    task = task_of(config.data.data_set)
    by = task.class_meter(opened.num_classes, device) if by_class else None
    made = by or task.meter(opened.num_classes, device)
    if isinstance(made, ClassMeter):
        made.unscored = opened.unscored
    return made


def eval_transform(config: Config, statistics: Any, input_size: tuple[int, int]) -> Any:
    """Return what makes a tensor of an image in evaluation.

    Args:
        config: The settings.
        statistics: Mean and standard deviation of the channels.
        input_size: Height and width, in pixels.
    """
    return task_of(config.data.data_set).eval_transform(config, statistics, input_size)


def warn_of_workers(config: Config, console: Console) -> None:
    """Print a line if there are more loader processes than cores; torch's own is longer."""
    cores, workers = os.cpu_count() or 1, config.data.num_workers
    if workers > cores:
        console.write(f"num_workers is {workers} on {cores} CPU cores; fewer may be faster")


def _readable(config: Config, samples: Samples, *, replacing: bool) -> Samples:
    """Skip a few unreadable samples, with --on-bad-image skip."""
    if config.data.on_bad_image == "error":
        return samples
    return data.SkipCorrupt(samples, replacing=replacing)


def _workers(config: Config, group: Processes) -> dict[str, Any]:
    on_gpu = group.device.type == "cuda"
    return {"workers": config.data.num_workers, "pin_memory": config.data.pin_mem and on_gpu}
