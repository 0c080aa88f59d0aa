"""The data that a configuration asks for, as batches on their way to the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fambav import data
from fambav.config import Config
from fambav.data import Batches, DataSet, Samples, TrainBatchesLoader
from fambav.data.device_augment import DeviceEvalLoader, DeviceSet, device_train_loader
from fambav.engine.runtime import Console, Processes

_REPEATS = 3  # views of an image in an epoch of repeated augmentation
_FAKE_CLASSES = 1000  # of images made up, as in ImageNet
_EVAL_BATCH = 1.5  # evaluation needs no gradients, so more images fit


def data_set(config: Config, group: Processes, *, input_size: tuple[int, int]) -> DataSet:
    """Open the data set, fetched first by one process if that is asked for.

    Raises:
        DataError: If the data is missing or damaged.
        ValueError: If the head that is asked for has another number of classes.
    """
    wanted, root = config.data, Path(config.data.data_path)
    if wanted.download:
        if group.main:
            data.fetch(wanted.data_set, root)
        group.wait()
    classes = config.model.num_classes
    found = data.load(
        wanted.data_set,
        root,
        inat_category=wanted.inat_category,
        classes=_FAKE_CLASSES if classes is None else classes,
        image_size=input_size,
        seed=config.run.seed,
    )
    if classes not in (None, found.num_classes):
        raise ValueError(
            f"num_classes is {classes}, expected {found.num_classes}, the classes of {found.name}"
        )
    return found


def train_batches(
    config: Config,
    found: DataSet,
    group: Processes,
    *,
    input_size: tuple[int, int],
    start_update: int | None = None,
    start_epoch: int = 0,
) -> TrainBatchesLoader:
    """Return this process's share of the batches that are left of the run.

    Args:
        config: The recipe.
        found: The data set.
        group: The processes.
        input_size: Height and width, in pixels.
        start_update: Updates that are done; None for those of `start_epoch` epochs.
        start_epoch: Epochs that are done.
    """
    share: dict[str, Any] = dict(
        batch_size=config.optim.batch_size,
        seed=config.run.seed,
        epochs=config.optim.epochs,
        rank=group.rank,
        world=group.world,
        accum=config.optim.grad_accum_steps,
        repeats=_REPEATS if config.augment.repeated_aug else 1,
        **_reading(config, group),
    )
    transform = _train_transform(config, found, input_size)
    make: Callable[..., TrainBatchesLoader]
    if config.augment.gpu_augment:
        make = partial(device_train_loader, DeviceSet(found.train, device=group.device))
    else:
        make = partial(data.train_loader, _samples(config, found.train, replacing=True))
    loader = make(transform, **share)
    start = start_epoch * loader.updates_per_epoch if start_update is None else start_update
    return make(transform, start_update=start, **share) if start else loader


def eval_batches(
    config: Config,
    found: DataSet,
    group: Processes,
    *,
    input_size: tuple[int, int],
    statistics: Any = None,
) -> Batches | DeviceEvalLoader:
    """Return this process's share of the held-out images.

    Args:
        config: The recipe.
        found: The data set.
        group: The processes.
        input_size: Height and width, in pixels.
        statistics: Mean and standard deviation of the channels, instead of those of the recipe.
    """
    statistics = statistics or found.statistics(config.data.data_stats)
    transform = eval_transform(config, statistics, input_size)
    share: dict[str, Any] = dict(
        batch_size=int(_EVAL_BATCH * config.optim.batch_size), rank=group.rank, world=group.world
    )
    if config.augment.gpu_augment:
        return DeviceEvalLoader(DeviceSet(found.val, device=group.device), transform, **share)
    return data.eval_loader(
        _samples(config, found.val, replacing=False), transform, **share, **_reading(config, group)
    )


def eval_transform(config: Config, statistics: Any, input_size: tuple[int, int]) -> Any:
    """Return what makes a tensor of an image in evaluation.

    Args:
        config: Says how much of an image is cut off.
        statistics: Mean and standard deviation of the channels.
        input_size: Height and width, in pixels.
    """
    mean, std = statistics
    ratio = config.data.eval_crop_ratio
    return data.eval_transform(input_size=input_size, eval_crop_ratio=ratio, mean=mean, std=std)


def mixing(config: Config, num_classes: int) -> data.Mix | None:
    """Return what mixes training batches, or None."""
    return data.mixup(
        config.augment,
        num_classes=num_classes,
        batch_size=config.optim.batch_size,
        seed=config.run.seed,
    )


def advise(config: Config, console: Console) -> None:
    """Say if there are more loader processes than cores; torch says it at more length."""
    cores = os.cpu_count() or 1
    if config.data.num_workers > cores:
        workers = config.data.num_workers
        console.say(f"num_workers is {workers} on {cores} CPU cores; fewer may be faster")


def _samples(config: Config, samples: Samples, *, replacing: bool) -> Samples:
    """Let a few samples be unreadable, if that is asked for."""
    if config.data.on_bad_image == "error":
        return samples
    return data.SkipCorrupt(samples, replacing=replacing)


def _reading(config: Config, group: Processes) -> dict[str, Any]:
    on_gpu = group.device.type == "cuda"
    return {
        "workers": config.data.num_workers,
        "pin_memory": config.data.pin_mem and on_gpu,
    }


def _train_transform(config: Config, found: DataSet, input_size: tuple[int, int]) -> Any:
    mean, std = found.statistics(config.data.data_stats)
    return data.train_transform(config.augment, input_size=input_size, mean=mean, std=std)
