"""Tasks: whatever differs between classification, segmentation or forecasting in a training run.

A task is one file here, which bears the name that `fambav.registry.DATA_SETS` gives.  It imports
torch where it computes, so that tables can read its metrics without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fambav.registry import DATA_SETS, TASKS

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from fambav.config import Config
    from fambav.table import Table

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean, standard deviation of channels
CHOICE = "val_"  # before a metric on the samples that choose the best epoch
Loss = Callable[["Tensor", "Tensor"], "Tensor"]
Mixing = Callable[..., "tuple[Tensor, Tensor]"]


class Metric(NamedTuple):
    """A metric on held-out samples.

    Attributes:
        name: log.txt has it as `test_NAME`, results have it as `NAME`.
        label: Head of a column.
        unit: Of its values; "" if it has none.
        title: Label of an axis.
        higher_is_better: Which of two values wins.
        hub: What Hugging Face calls it.
        digits: Behind the point, where it is written for people.
    """

    name: str
    label: str
    unit: str
    title: str
    higher_is_better: bool
    hub: str = ""
    digits: int = 2

    @property
    def head(self) -> str:
        """Label and unit."""
        return f"{self.label} {self.unit}".rstrip()

    @property
    def suffix(self) -> str:
        """Unit as it stands behind a number."""
        return self.unit if self.unit in ("", "%") else f" {self.unit}"

    @property
    def key(self) -> str:
        """Its key in log.txt."""
        return f"test_{self.name}"

    @property
    def choice_key(self) -> str:
        """Its key in log.txt on the samples that choose the best epoch, where there are such."""
        return f"test_{CHOICE}{self.name}"

    def gain(self, value: float, base: float) -> float:
        """Return by how much a value is better than another; negative if it is worse."""
        return value - base if self.higher_is_better else base - value


class Scores(NamedTuple):
    """What an evaluation yields.

    Attributes:
        metrics: Loss and metrics by name, in the order of log.txt.
        samples: How many samples were counted, each once.
    """

    metrics: dict[str, float]
    samples: int


class Meter(ABC):
    """Sums over samples that metrics follow from; sums of several processes are added up.

    Args:
        size: Number of sums.
        device: Where they are kept.

    Attributes:
        sums: (size + 1,), float64; the last one counts the samples.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        import torch

        self.sums = torch.zeros(size + 1, dtype=torch.float64, device=device)

    def update(self, outputs: Any, targets: Any) -> Tensor:
        """Add a batch.

        Returns:
            Whether all its sums are finite, a scalar, bool.
        """
        sums = self.batch_sums(outputs, targets)
        self.sums[:-1] += sums
        self.sums[-1] += len(targets)
        return sums.isfinite().all()

    def share(self, gather: Callable[[Any], list[Any]]) -> None:
        """Bring together what is kept beside the sums; here nothing.

        Args:
            gather: Returns the plain data that each process passes, by rank.
        """
        del gather

    def scores(self) -> Scores:
        """Return the metrics of all samples; there must be one at least."""
        sums = self.sums.cpu()
        samples = int(sums[-1])
        return Scores(self.metrics(sums[:-1], samples), samples)

    @abstractmethod
    def batch_sums(self, outputs: Any, targets: Any) -> Tensor:
        """Return the sums of one batch, (size,), float64; NaN if an output is not finite.

        Args:
            outputs: Of the model.
            targets: As the data set has them.
        """

    @abstractmethod
    def metrics(self, sums: Tensor, samples: int) -> dict[str, float]:
        """Return loss and metrics of the sums of all batches, in the order of log.txt."""


class ClassMeter(Meter):
    """A meter that counts by class too, and describes single samples.

    Args:
        size: Number of sums that the metrics follow from; `batch_sums` returns them first, then
            those of the confusion matrix, row by row.
        num_classes: Number of classes.
        device: Where the sums are kept.

    Attributes:
        unscored: Classes that means over classes leave out.
    """

    unscored: tuple[int, ...] = ()

    def __init__(self, size: int, num_classes: int, device: torch.device) -> None:
        super().__init__(size + num_classes**2, device)
        self.num_classes = num_classes

    def confusion(self) -> Tensor:
        """Return how often each class was predicted for each true one.

        Returns:
            (true class, predicted class), int64, on the CPU; of images, or of pixels.
        """
        counts = self.sums[-1 - self.num_classes**2 : -1]
        return counts.long().cpu().view(self.num_classes, self.num_classes)

    @abstractmethod
    def table(self, names: Sequence[str]) -> Table:
        """Return a row for each class that there are samples of, the weakest first.

        Args:
            names: Of the classes, in order.
        """

    @abstractmethod
    def describe(self, outputs: Any, targets: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return what is to be known of each sample of a batch, by the name of its column.

        Args:
            outputs: Of the model.
            targets: As the data set has them.
            names: Of the classes, in order.
        """


class Task(ABC):
    """All of a run that is not the loop.

    Attributes:
        hub: What Hugging Face calls the task.
        tags: Others of the hub.
        metrics: The primary one first, by which checkpoints, runs and plans are compared.
        output: The setting that is the length of a model's output.
        classes: Whether an output is a logit for each class.
        pictures: What `fambav show` draws of a model on an image, of `fambav.registry.PICTURES`.
        guided: Whether a model reads the targets too, in training.
        collate: Makes a batch of samples; None where inputs and targets are stacked.
        exported: Whether a model's output is one tensor, which its export is compared by.
    """

    hub: str
    tags: tuple[str, ...] = ()
    metrics: tuple[Metric, ...]
    output: str = "num_classes"
    classes: bool = False
    pictures: tuple[str, ...] = ()
    guided: bool = False
    collate: Callable[[Sequence[Any]], Any] | None = None
    exported: bool = True

    @property
    def primary(self) -> Metric:
        """The metric that decides."""
        return self.metrics[0]

    @property
    def best_key(self) -> str:
        """Key of the best value of the primary metric in a checkpoint."""
        return f"best_{self.primary.name}"

    def best_epoch(self, history: Sequence[Mapping[str, Any]]) -> int:
        """Return the place of the best record, of equal ones the first.

        Where a data set has samples for that choice, no held-out one takes part in it.

        Args:
            history: Records of epochs as log.txt has them, at least one.
        """
        primary = self.primary
        key = primary.choice_key if primary.choice_key in history[0] else primary.key
        values = [record[key] for record in history]
        return values.index((max if self.primary.higher_is_better else min)(values))

    def line(self, scores: Scores) -> str:
        """Return the line that is printed of an evaluation, with a star in front."""
        labels = {metric.name: metric.label for metric in self.metrics}
        values = (f"{labels.get(name, name)} {value:.3f}" for name, value in scores.metrics.items())
        return f"* {' '.join(values)}"

    def best_line(self, value: float) -> str:
        """Return the line that is printed of the best epoch so far."""
        return f"Best {self.primary.label}: {value:.4g}{self.primary.suffix}"

    def summary(self, scores: Scores) -> str:
        """Return the last line of a run that only evaluates."""
        value, primary = scores.metrics[self.primary.name], self.primary
        return f"{primary.title} on the {scores.samples} test samples: {value:.4g}{primary.suffix}"

    def input_shape(self, channels: int, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one input.

        Args:
            channels: How many means and standard deviations there are.
            size: As a model's `pretrained_cfg` ends with it.
        """
        return channels, *size

    def input_words(self, config: Config, size: tuple[int, int]) -> dict[str, Any]:
        """Return how evaluation makes inputs, in the words of timm's `pretrained_cfg`."""
        return {}

    def input_lines(self, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Return lines of a model card on inputs and outputs.

        Args:
            known: The `pretrained_cfg` of the model.
        """
        return ()

    def preprocessing(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of Hugging Face's preprocessor_config.json; `known` as above."""
        return {}

    @abstractmethod
    def train_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return what augments a sample and makes a tensor of it.

        Args:
            config: The settings.
            statistics: Mean and standard deviation of the channels.
            input_size: Height and width, in pixels.
        """

    @abstractmethod
    def eval_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return what makes a tensor of a sample in evaluation; arguments as above."""

    def inference(self, config: Config, net: nn.Module, input_size: tuple[int, int]) -> nn.Module:
        """Return the model as evaluation calls it; arguments as above."""
        return net

    def answer(
        self,
        image: Image.Image,
        net: nn.Module,
        outputs_of: Callable[[Image.Image], Tensor],
        names: Sequence[str],
        *,
        file: Path,
        topk: int | None = None,
        folder: Path | None = None,
    ) -> list[str]:
        """Return lines on what a model makes of an image, and write files if it makes pictures.

        Args:
            image: The image, in RGB.
            net: The model as `inference` returns it.
            outputs_of: Its outputs for an image, (1, ...).
            names: Of the classes, in order.
            file: Where the image is from.
            topk: How many classes are wanted; None for the usual number.
            folder: Where files go; None for nowhere.

        Raises:
            ValueError: If one of the last two means nothing, or is needed and missing.
        """
        raise ValueError(f"task is {self.hub}, expected one that makes something of an image")

    def mixing(self, config: Config, num_classes: int) -> Mixing | None:
        """Return what makes mixed (images, targets) of (images, targets, update=); None for not."""
        return None

    @abstractmethod
    def loss(self, config: Config, *, mixed: bool) -> Loss:
        """Return the mean loss of (outputs, targets) over a batch.

        Args:
            config: The settings.
            mixed: Whether targets are those of `mixing`.
        """

    @abstractmethod
    def meter(self, num_classes: int, device: torch.device) -> Meter:
        """Return an empty meter of this process's samples."""

    def class_meter(self, num_classes: int, device: torch.device) -> ClassMeter | None:
        """Return one that counts by class too; None if the task has no classes."""
        return None


def task_of(data_set: str) -> Task:
    """Return the task of a data set.

    Args:
        data_set: One of `fambav.registry.DATA_SETS`.
    """
    name = DATA_SETS[data_set]
    if name not in TASKS.names():
        import_module(f"fambav.tasks.{name}")
    task: Task = TASKS[name]
    return task
