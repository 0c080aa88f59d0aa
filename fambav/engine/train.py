"""Training: one update, and the updates of an epoch.

lr(update) -> forward and backward of each micro-batch -> clip -> step -> moving average
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.engine.optim import Average
from fambav.engine.runtime import Precision, Processes
from fambav.layers.drop import shard

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Lesson = Callable[[Tensor, Tensor, Tensor], Tensor]

MAX_SKIPPED = 20  # updates in a row


class DivergedError(RuntimeError):
    """The loss stopped being a number."""


class Summary(NamedTuple):
    """What an epoch came to.

    Attributes:
        loss: Mean over the updates that were made, over all processes.
        skipped: Updates left out because their loss was not finite.
    """

    loss: float
    skipped: int


@dataclass(kw_only=True)
class Update:
    """One step of the optimizer, from `accumulate` batches of each process.

    Attributes:
        model: The model itself, for its weights.
        forward: The same model, wrapped for several processes if need be.
        optimizer: Over the model's parameters.
        loss: Mean loss of (logits, targets) over a batch; of (logits, targets, teacher's logits)
            if there is a teacher.
        lr: Learning rate, given the number of updates done.
        seed: Called before each forward pass with the number of updates done and that of the
            batch among all batches of the update; seeds whatever the model draws from.
        teacher: Logits of the mixed images, which need no gradient; None for not.
        mix: Makes mixed images and soft targets of (images, targets, update=); None for not.
        precision: Format of the forward pass.
        processes: Who shares the update.
        accumulate: Batches of each process in an update.
        max_grad_norm: The gradient is clipped to this norm; None for not.
        average: Follows the model.
        skipping: Leave out an update whose loss is not finite, instead of stopping.
        training: Whether dropout and skipped blocks are on.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: Any
    loss: Loss | Lesson
    lr: Callable[[int], float]
    seed: Callable[[int, int], None]
    teacher: Callable[[Tensor], Tensor] | None = None
    mix: Callable[..., Batch] | None = None
    precision: Precision
    processes: Processes
    accumulate: int = 1
    max_grad_norm: float | None = None
    average: Average | None = None
    skipping: bool = False
    training: bool = True

    def __call__(self, batches: Iterator[Batch], update: int) -> Tensor:
        """Do update number `update`, from 0; return this process's mean loss, a scalar."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(update)
        loss = torch.zeros((), device=self.processes.device)
        for micro in range(self.accumulate):
            loss += self._backward(next(batches), update, micro)
        if self.skipping and not self._everywhere_finite(loss):
            loss.fill_(torch.nan)
        else:
            self._step()
            if self.average is not None:
                self.average.update(self.model, update + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _backward(self, batch: Batch, update: int, micro: int) -> Tensor:
        images, targets = (t.to(self.processes.device, non_blocking=True) for t in batch)
        if self.mix is not None:
            images, targets = self.mix(images, targets, update=update)
        world = self.processes.world
        place = micro * world + self.processes.rank
        self.seed(update, place)
        with shard(place, world * self.accumulate), self._sync(micro):
            with self.precision.autocast():
                taught = () if self.teacher is None else (self.teacher(images),)
                loss = self.loss(self.forward(images), targets, *taught) / self.accumulate
            self.precision.scaler.scale(loss).backward()
        return loss.detach()

    def _sync(self, micro: int) -> AbstractContextManager[None]:
        """Average gradients over the processes after the last batch only."""
        if micro + 1 < self.accumulate and isinstance(
            self.forward, nn.parallel.DistributedDataParallel
        ):
            waiting: AbstractContextManager[None] = self.forward.no_sync()
            return waiting
        return nullcontext()

    def _step(self) -> None:
        scaler = self.precision.scaler
        if self.max_grad_norm is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()

    def _everywhere_finite(self, loss: Tensor) -> bool:
        bad = (~loss.isfinite()).double()
        return self.processes.total(bad).item() == 0


class Losses:
    """The losses of an epoch, fetched from the device and from the other processes in groups."""

    def __init__(self, update: Update, start: int) -> None:
        self._update = update
        self._done = start
        self._waiting: list[Tensor] = []
        self._finite: list[float] = []
        self._skipped = 0
        self._row = 0

    def add(self, loss: Tensor) -> None:
        """Take the loss of the next update."""
        self._waiting.append(loss)

    def fetch(self) -> list[float]:
        """Return the losses added since the last fetch, each the mean over the processes.

        Raises:
            DivergedError: If one is not finite, or too many in a row were skipped for it.  All
                processes raise it together, since all see the same sum.
        """
        processes = self._update.processes
        sums = processes.total(torch.stack(self._waiting).double())
        values: list[float] = (sums / processes.world).tolist()
        for value in values:
            self._take(value)
        self._waiting.clear()
        return values

    def _take(self, value: float) -> None:
        if math.isfinite(value):
            self._finite.append(value)
            self._row = 0
        else:
            self._skipped += 1
            self._row += 1
            if not self._update.skipping or self._row > MAX_SKIPPED:
                raise DivergedError(
                    f"loss is {value} at update {self._done}, expected a finite number; "
                    f"the learning rate there is {self._update.lr(self._done):.3g}"
                )
        self._done += 1

    def summary(self) -> Summary:
        """Return what the epoch came to."""
        mean = sum(self._finite) / len(self._finite) if self._finite else math.nan
        return Summary(mean, self._skipped)


def train_epoch(
    update: Update,
    batches: Iterable[Batch],
    *,
    updates: range,
    first: AbstractContextManager[Any] | None = None,
    every: int = 10,
    report: Callable[[int, list[float]], None],
) -> Summary:
    """Make the updates of one epoch.

    Args:
        update: One step.
        batches: Images, (batch, channels, height, width), and labels, (batch,), in order;
            `update.accumulate` of them for each update.
        updates: Numbers of the updates, counted from the start of the run.
        first: Surrounds the first update, to measure it.
        every: Updates from one report to the next; only then is the device waited for.
        report: Told the updates done so far in the run and the losses since the last report.

    Raises:
        DivergedError: If a loss is not finite.
    """
    update.forward.train(update.training)
    stream, losses = iter(batches), Losses(update, updates.start)
    for number in updates:
        with first if first and number == updates.start else nullcontext():
            losses.add(update(stream, number))
        if (number + 1 - updates.start) % every == 0 or number + 1 == updates.stop:
            report(number + 1, losses.fetch())
    return losses.summary()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits, (batch, classes), and probabilities of the same shape."""
    return F.cross_entropy(logits, targets)


def smooth_cross_entropy(smoothing: float) -> Loss:
    """Return the mean cross-entropy of logits, (batch, classes), and labels, (batch,).

    Args:
        smoothing: Share of the target spread over all classes, at least 0 and less than 1.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    return loss


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy over samples and classes, each class its own decision.

    Targets, probabilities or labels, are first made yes or no: a class with any share is a yes.
    Smoothed targets have a share in every class, so smoothing must be off.

    Source: DeiT III, arXiv:2204.07118, as its code computes it.
    """
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, targets.gt(0).to(logits.dtype))
