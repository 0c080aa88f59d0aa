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
    """The loss or the gradient stopped being a number.

    Attributes:
        update: Number of the update.
        loss: Its mean loss over the processes, as far as it is known.
    """

    def __init__(self, message: str, *, update: int, loss: float) -> None:
        super().__init__(message)
        self.update, self.loss = update, loss


class Summary(NamedTuple):
    """What an epoch came to.

    Attributes:
        loss: Mean over the updates that were made, over all processes.
        skipped: Updates left out because their loss or gradient was not finite.
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
        skipping: Leave out an update whose loss or gradient is not finite, instead of stopping.
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
        """Do update number `update`, from 0; return this process's mean loss, a scalar.

        The loss is NaN if it or the gradient is not finite.  Where looking costs no time, on a CPU
        or when such updates are skipped anyway, the weights are then left as they were; elsewhere
        the step is made before anybody has seen the loss.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(update)
        loss = torch.zeros((), device=self.processes.device)
        for micro in range(self.accumulate):
            loss += self._backward(next(batches), update, micro)
        finite = self._finite(loss)
        loss.masked_fill_(~finite, torch.nan)
        if (not self.looks or finite) and self._step() and self.average is not None:
            self.average.update(self.model, update + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    @property
    def looks(self) -> bool:
        """Whether each update is looked at before its step."""
        return self.skipping or self.processes.device.type == "cpu"

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

    def _step(self) -> bool:
        """Take the step; return whether it was made, which a loss scale that overflows forbids."""
        scaler = self.precision.scaler
        if self.max_grad_norm is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        return scaler.get_scale() >= before  # only a step that was left out makes it smaller

    def _finite(self, loss: Tensor) -> Tensor:
        """Whether loss and gradient are finite, on all processes: a scalar, bool.

        The gradient is the same on all of them.  Under a loss scale one that overflows is the
        scaler's own business, which then leaves the step out and takes a smaller scale.
        """
        bad = ~loss.isfinite()
        if not self.precision.scaler.is_enabled():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            bad |= ~nn.utils.get_total_norm(gradients).isfinite()
        return self.processes.total(bad.double()) == 0


class Losses:
    """The losses of an epoch, fetched from the device and from the other processes in groups.

    Args:
        update: What makes them.
        start: Number of the epoch's first update.
        known: Losses of the updates that are made already, NaN for one that was left out.
    """

    def __init__(self, update: Update, start: int, known: Iterable[float] = ()) -> None:
        self._update = update
        self._start = start
        self._waiting: list[Tensor] = []
        self.values = list(known)

    def __len__(self) -> int:
        """Return how many updates of the epoch are made."""
        return len(self.values) + len(self._waiting)

    def add(self, loss: Tensor) -> None:
        """Take the loss of the next update."""
        self._waiting.append(loss)

    def fetch(self) -> list[float]:
        """Return the losses added since the last fetch, each the mean over the processes.

        Raises:
            DivergedError: If one is not finite, or too many in a row were skipped for it.  All
                processes raise it together, since all see the same sum.
        """
        if not self._waiting:
            return []
        processes = self._update.processes
        sums = processes.total(torch.stack(self._waiting).double())
        found: list[float] = (sums / processes.world).tolist()
        self._waiting.clear()
        for value in found:
            self.values.append(value)
            self._refuse(value)
        return found

    def _refuse(self, value: float) -> None:
        if math.isfinite(value):
            return
        row = next(
            (n for n, v in enumerate(self.values[::-1]) if math.isfinite(v)), len(self.values)
        )
        if self._update.skipping and row <= MAX_SKIPPED:
            return
        update = self._start + len(self.values) - 1
        many = f" and {row - 1} before it" if self._update.skipping else ""
        raise DivergedError(
            f"loss or gradient is not finite at update {update}{many}, expected finite numbers; "
            f"the learning rate there is {self._update.lr(update):.3g}",
            update=update,
            loss=value,
        )

    def summary(self) -> Summary:
        """Return what the epoch came to."""
        finite = [value for value in self.values if math.isfinite(value)]
        mean = sum(finite) / len(finite) if finite else math.nan
        return Summary(mean, len(self.values) - len(finite))


def train_epoch(
    update: Update,
    batches: Iterable[Batch],
    *,
    updates: range,
    losses: Losses,
    first: AbstractContextManager[Any] | None = None,
    every: int = 10,
    report: Callable[[int, list[float]], None],
    pause: Callable[[], None] = lambda: None,
) -> Summary:
    """Make the updates of one epoch that are left.

    Args:
        update: One step.
        batches: Images, (batch, channels, height, width), and labels, (batch,), in order;
            `update.accumulate` of them for each update.
        updates: Numbers of the updates, counted from the start of the run.
        losses: Those of the epoch so far; takes the others.
        first: Surrounds the first update, to measure it.
        every: Updates from one report to the next; only then is the device waited for.
        report: Told the updates done so far in the run and the losses since the last report.
        pause: Called before each update; may end the epoch by raising an exception.

    Raises:
        DivergedError: If a loss is not finite.
    """
    update.forward.train(update.training)
    stream = iter(batches)
    for number in updates:
        pause()
        with first if first and number == updates.start else nullcontext():
            loss = update(stream, number)
        losses.add(loss)
        last = number + 1 == updates.stop
        if last or len(losses) % every == 0 or (update.looks and not loss.isfinite()):
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
