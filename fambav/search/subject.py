"""A trained model with the data it was trained on: images to search on, and those held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fambav.config import Config
from fambav.data import DataSet
from fambav.engine.distributed import Processes, processes
from fambav.engine.evaluate import evaluate
from fambav.engine.precision import Precision
from fambav.models import Backbone, Hierarchical
from fambav.reduction import Reduction, StagedReduction, make_any_reduction
from fambav.registry import family_of
from fambav.seeding import key
from fambav.tasks import Scores, Task, task_of
from fambav.training import batches
from fambav.training.inference import FREE, LoadedRun, load_run
from fambav.training.job import process_settings
from fambav.training.step import precision


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that plans are searched for.

    Attributes:
        run: The weights, and the settings they were trained with; its model is on its device and
            keeps every token.
        config: The same settings with those of the data filled in and every token kept.
        reduction: What the model was trained with.
        data: The data set.
        group: This process.
    """

    run: LoadedRun
    config: Config
    reduction: Reduction | StagedReduction
    data: DataSet
    group: Processes

    @property
    def path(self) -> Path:
        """The file of weights."""
        return self.run.source

    @property
    def net(self) -> Backbone | Hierarchical:
        """The model."""
        return cast(Backbone | Hierarchical, self.run.net)

    @property
    def precision(self) -> Precision:
        """Format of the forward pass."""
        return precision(self.config, self.group)

    @property
    def task(self) -> Task:
        """The task of the data set."""
        return task_of(self.config.data.data_set)

    @property
    def _statistics(self) -> tuple[Any, Any]:
        return self.run.state.statistics_for(self.config, self.data)

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
        indices = torch.randperm(len(samples), generator=source)[:count].tolist()
        transform = batches.eval_transform(self.config, self._statistics, self.net.img_size)
        pairs = [samples[index] for index in indices]
        images = torch.stack([transform(image) for image, _ in pairs])
        labels = torch.tensor([label for _, label in pairs])
        return images.to(self.group.device), labels.to(self.group.device)

    def metric(self, reduction: Reduction | StagedReduction) -> float:
        """Return the primary metric of the model under a reduction on the held-out images."""
        return self.held_out(reduction).metrics[self.task.primary.name]

    def held_out(self, reduction: Reduction | StagedReduction) -> Scores:
        """Score the model under a reduction on the held-out images, as `main.py --eval` does."""
        net: Any = self.net
        before, net.reduction = net.reduction, reduction
        loader = batches.eval_batches(
            self.config,
            self.data,
            self.group,
            input_size=self.net.img_size,
            statistics=self._statistics,
        )
        try:
            return evaluate(
                net,
                loader,
                meter=self.task.meter(self.data.num_classes, self.group.device),
                processes=self.group,
                precision=self.precision,
            )
        finally:
            net.reduction = before


@contextmanager
def opened(
    path: Path, *, config: Config | None = None, changes: Mapping[str, Any] | None = None
) -> Iterator[Subject]:
    """Open a run or a file of weights, with what its settings set for the whole process.

    Args:
        path: As in `training.inference.load_run`.
        config: The settings of a file that is not ours; a file of ours knows its own.
        changes: Settings to replace in those of a file of ours, of `FREE`.

    Raises:
        CheckpointError: If the file cannot be used.
        ValueError: If the model is not one whose tokens can be reduced, or a setting may not
            differ.
        DataError: If the data is missing or damaged.
    """
    run = load_run(path, changes, config=config, allowed=FREE)
    net, trained = run.net, run.config
    if not isinstance(net, Backbone | Hierarchical) or not family_of(trained.model.model).reducible:
        raise ValueError(
            f"model is {trained.model.model!r}, expected one whose tokens can be reduced"
        )
    reduction = net.reduction
    cast(Any, net).reduction = make_any_reduction(net.info).eval()
    complete = trained.unreduced().replace(
        resume="", finetune="", eval=False, output_dir=None, num_classes=run.num_classes
    )
    with process_settings(complete), processes(complete.run.device) as group:
        data_set = batches.data_set(complete, group, input_size=net.img_size)
        net.to(group.device)
        reduction.to(group.device)
        yield Subject(run=run, config=complete, reduction=reduction, data=data_set, group=group)
