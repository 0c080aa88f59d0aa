"""A trained model with the data it was trained on: images to search on, and those held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fambav import training
from fambav.config import Config
from fambav.data import DataSet
from fambav.engine.checkpoint import CheckpointError
from fambav.engine.distributed import Processes, processes
from fambav.engine.evaluate import evaluate
from fambav.engine.precision import Precision, determinism_settings
from fambav.engine.record import CHECKPOINT
from fambav.models import Backbone
from fambav.ops import force, set_backend
from fambav.randomness import key
from fambav.reduction import Reduction
from fambav.tasks import Scores, Task, task_of
from fambav.training import batches, entries, saved
from fambav.training.step import precision

# What may be said of a file that knows its own settings: where and how fast, not what.
FREE = {
    "data_path",
    "download",
    "device",
    "num_workers",
    "threads",
    "scan_backend",
    "amp",
    "amp_dtype",
    "matmul_precision",
    "deterministic",
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that plans are looked for.

    Attributes:
        path: The file of its weights.
        config: Its settings, with those of the data filled in and every token kept.
        trained: The settings it was trained with.
        net: In evaluation mode, on its device.
        data: The data set.
        group: This process.
    """

    path: Path
    config: Config
    trained: Config
    net: Backbone
    data: DataSet
    group: Processes

    @property
    def precision(self) -> Precision:
        """Format of the forward pass."""
        return precision(self.config, self.group)

    @property
    def task(self) -> Task:
        """The task of the data set."""
        return task_of(self.config.data.data_set)

    def calibration(self, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Draw images of the training set, prepared as for evaluation.

        Args:
            count: How many, 1 or more.
            seed: Of the draw.

        Returns:
            The images, (count, channels, height, width), float32, and their labels, (count,),
            int64, on the model's device.

        Raises:
            ValueError: If the training set has fewer.
        """
        samples = self.data.train
        if count > len(samples):
            raise ValueError(
                f"images is {count}, expected at most {len(samples)}, the training images of "
                f"{self.data.name}"
            )
        source = torch.Generator().manual_seed(key(seed, "calibration"))
        places = torch.randperm(len(samples), generator=source)[:count].tolist()
        statistics = self.data.statistics(self.config.data.data_stats)
        transform = batches.eval_transform(self.config, statistics, self.net.img_size)
        pairs = [samples[place] for place in places]
        images = torch.stack([transform(image) for image, _ in pairs])
        labels = torch.tensor([label for _, label in pairs])
        return images.to(self.group.device), labels.to(self.group.device)

    def held_out(self, reduction: Reduction) -> Scores:
        """Score the model under a reduction on the held-out images, as `main.py --eval` does."""
        before, self.net.reduction = self.net.reduction, reduction
        loader = batches.eval_batches(
            self.config, self.data, self.group, input_size=self.net.img_size
        )
        try:
            return evaluate(
                self.net,
                loader,
                meter=self.task.meter(self.data.num_classes, self.group.device),
                processes=self.group,
                precision=self.precision,
            )
        finally:
            self.net.reduction = before


@contextmanager
def opened(
    path: Path, *, asked: Config | None = None, changes: Mapping[str, Any] | None = None
) -> Iterator[Subject]:
    """Open a run or a file of weights, with what its settings set for the whole process.

    Args:
        path: A run's folder, whose last epoch is taken, or a file.
        asked: The settings of a file that is not ours; a file of ours knows its own.
        changes: Settings to replace in those of a file of ours, of `FREE`.

    Raises:
        CheckpointError: If the file cannot be used.
        ValueError: If the model is not one whose tokens can be reduced, or a setting may not
            differ.
        DataError: If the data is missing or damaged.
    """
    source = weights(path)
    state = entries.load(source)
    trained = _settings(source, state, asked, dict(changes or {}))
    config = trained.dense().replace(resume="", finetune="", eval=False, output_dir=None)
    with _computing(config), processes(config.run.device) as group:
        if config.model.model.startswith("timm/"):
            raise ValueError(
                f"model is {config.model.model!r}, expected one whose tokens can be reduced"
            )
        size = training.network.sketch(config).input_size
        found = batches.data_set(config, group, input_size=size)
        net = training.model(config, num_classes=found.num_classes)
        saved.put(source, state, net)
        yield Subject(
            path=source,
            config=config.replace(num_classes=found.num_classes),
            trained=trained,
            net=cast(Backbone, net.eval().to(group.device)),
            data=found,
            group=group,
        )


def weights(path: Path) -> Path:
    """Return the file of weights of a run, or the file itself.

    Raises:
        CheckpointError: If there is none.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint is {path}, expected a file or a run that exists")
    if not path.is_dir():
        return path
    found = [path / name for name in (CHECKPOINT, "model.safetensors") if (path / name).is_file()]
    if not found:
        raise CheckpointError(f"run is {path}, expected a folder with {CHECKPOINT}")
    return found[0]


def _settings(source: Path, state: Any, asked: Config | None, changes: dict[str, Any]) -> Config:
    """Return the settings of a file, or those asked for if it does not say."""
    known = saved.settings(state)
    if known is None and asked is None:
        raise CheckpointError(
            f"{source} does not say what it is of, expected a file of ours; name its model with "
            "--model and its data with --data-set"
        )
    if known is None:
        return cast(Config, asked)
    if asked is not None:
        raise CheckpointError(f"{source} says itself what it is of, expected no model beside it")
    for name in changes:
        if name not in FREE:
            raise ValueError(f"{name} is set beside {source}, which says itself what it is")
    return known.replace(**changes) if changes else known


@contextmanager
def _computing(config: Config) -> Iterator[None]:
    """Set what holds for the whole process, and put it back at the end."""
    backend = config.model.scan_backend
    with (
        determinism_settings(
            deterministic=config.run.deterministic,
            matmul_precision=config.optim.matmul_precision,
            threads=config.run.threads,
        ),
        nullcontext() if backend is None else force(None),
    ):
        if backend is not None:
            set_backend(backend)
        yield
