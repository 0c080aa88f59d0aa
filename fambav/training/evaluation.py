"""A trained model on its evaluation set: the metrics, and what they say of classes and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import torch

from fambav.data import DataSet, ListedImages, ListedMasks
from fambav.engine.distributed import processes
from fambav.engine.evaluate import evaluate
from fambav.table import Table
from fambav.tasks import ClassMeter, Meter, Scores, Task, task_of
from fambav.training import batches
from fambav.training.inference import FREE, OPEN, LoadedRun
from fambav.training.job import process_settings
from fambav.training.network import layout
from fambav.training.step import precision

# What may differ from the settings of a run that is evaluated.
ALLOWED = (OPEN | FREE | {"data_set", "inat_category", "batch_size", "on_bad_image"}) - {
    "num_classes",
    "horizon",
    "drop",
    "drop_path",
    "grad_checkpointing",
}


class NoClassesError(ValueError):
    """A task that has no classes to count by."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass over the evaluation set yields, of all processes.

    Attributes:
        task: The task of the data set.
        data: The data set.
        scores: The metrics.
        meter: The sums that they follow from; a `ClassMeter` if classes or samples are wanted.
        samples: Each sample's index, and what the task knows of it, in order; empty unless wanted.
    """

    task: Task
    data: DataSet
    scores: Scores
    meter: Meter
    samples: Sequence[tuple[int, dict[str, Any]]]

    @property
    def names(self) -> Sequence[str]:
        """Of the classes, in order."""
        return names_of_classes(self.data)

    def classes(self) -> Table:
        """Return the task's table of classes."""
        return self._by_class.table(self.names)

    def confusion(self) -> Any:
        """Return the confusion matrix, (true class, predicted class), int64, as an array."""
        return self._by_class.confusion().numpy()

    def predictions(self) -> Table:
        """Return a row of values for each sample: index, path if it has one, prediction."""
        held_out = self.data.val
        head = ["index", "path", *(self.samples[0][1] if self.samples else ())]
        rows = [
            [
                index,
                held_out.path(index) if isinstance(held_out, ListedImages | ListedMasks) else None,
                *own.values(),
            ]
            for index, own in self.samples
        ]
        return Table(head=head, rows=(), names=0, values=[head, *rows])

    @property
    def _by_class(self) -> ClassMeter:
        if not isinstance(self.meter, ClassMeter):
            raise ValueError("by_class is False, expected True for what is known of classes")
        return self.meter


def names_of_classes(data_set: DataSet) -> Sequence[str]:
    """Return the names of a data set's classes, in order; without names they are numbered."""
    return data_set.class_names or [f"class {number}" for number in range(data_set.num_classes)]


def evaluate_run(run: LoadedRun, *, by_class: bool = False, by_sample: bool = False) -> Evaluation:
    """Evaluate a model as `main.py --eval` does, in one pass, which processes share.

    Args:
        run: The model; it moves to the device of its settings.
        by_class: Count by class.
        by_sample: Keep what the task knows of every sample.

    Returns:
        The same evaluation in every process.

    Raises:
        NoClassesError: If the task has no classes, and one of the two is wanted.
        DataError: If the data is missing or damaged.
        NotFiniteError: If a logit is not finite.
        ValueError: If the data has another number of classes.
    """
    config = run.config.replace(
        resume="", finetune="", eval=False, output_dir=None, **{run.task.output: run.num_classes}
    )
    task, size = task_of(config.data.data_set), layout(config).input_size
    counted = by_class or by_sample
    if counted and task.class_meter(run.num_classes, torch.device("cpu")) is None:
        name = config.data.data_set
        raise NoClassesError(f"data_set is {name!r}, expected one whose task has classes")
    with process_settings(config), processes(config.run.device) as group:
        opened = batches.data_set(config, group, input_size=size)
        meter = batches.meter(config, opened, group.device, by_class=counted)
        loader = batches.eval_batches(
            config,
            opened,
            group,
            input_size=size,
            statistics=run.state.statistics_for(config, opened),
        )
        known: list[dict[str, Any]] = []

        def keep(outputs: Any, targets: Any) -> None:
            if by_sample and isinstance(meter, ClassMeter):
                known.extend(meter.describe(outputs, targets, names_of_classes(opened)))

        scores = evaluate(
            task.inference(config, run.net.to(group.device), size).eval(),
            loader,
            meter=meter,
            processes=group,
            precision=precision(config, group),
            each=keep,
        )
        own = zip(loader.indices(), known, strict=True) if by_sample else ()
        samples = sorted(chain(*group.gather(list(own))), key=itemgetter(0))
    return Evaluation(task=task, data=opened, scores=scores, meter=meter, samples=samples)
