"""One update of the weights, and the losses of an epoch.

lr(update) -> forward and backward of each micro-batch -> clip -> step -> moving average
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fambav.engine.distributed import Processes
from fambav.engine.optim import Average
from fambav.engine.precision import Precision
from fambav.layers.drop import shard

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]
DistillationLoss = Callable[..., Tensor]  # of outputs, targets and the teacher's logits

MAX_SKIPPED = 20  # updates in a row


class DivergedError(RuntimeError):
    """The loss or the gradient became NaN or infinite.

    Attributes:
        update: Number of the update.
        loss: Its mean loss over the processes, as far as it is known.
    """

    def __init__(self, message: str, *, update: int, loss: float) -> None:
        super().__init__(message)
        self.update, self.loss = update, loss


class Summary(NamedTuple):
    """The losses of an epoch in short.

    Attributes:
        loss: Mean over the updates that were made, over all processes.
        skipped: Updates skipped because their loss or gradient was not finite.
    """

    loss: float
    skipped: int


@dataclass(kw_only=True)
class TrainStep:
    """One step of the optimizer, from `accumulate` batches of each process.

    Attributes:
        model: The model itself, for its weights.
        forward: The same model, wrapped for several processes if need be.
        optimizer: Over the model's parameters.
        loss: Mean loss of (outputs, targets) over a batch; with a teacher, of (logits, targets,
            teacher's logits).
        lr: Learning rate, given the number of updates done.
        seed: Called before each forward pass with the number of updates done and that of the
            batch among all batches of the update; seeds the generators that the model draws from.
        teacher: Logits of the mixed images, which need no gradient; None for not.
        taught_from: Update from which there is a teacher; the loss is without its logits before.
        mix: Makes mixed images and soft targets of (images, targets, update=); None for not.
        precision: Format of the forward pass.
        processes: Those that share the update.
        accumulate: Batches of each process in an update.
        max_grad_norm: The gradient is clipped to this norm; None for not.
        average: Follows the model.
        guided: Whether the model reads the targets too, in training.
        skipping: Skip an update whose loss or gradient is not finite, instead of stopping.
        training: Whether dropout and skipped blocks are on.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: Any
    loss: Loss | DistillationLoss
    lr: Callable[[int], float]
    seed: Callable[[int, int], None]
    teacher: Callable[[Tensor], Tensor] | None = None
    taught_from: int = 0
    mix: Callable[..., Batch] | None = None
    precision: Precision
    processes: Processes
    accumulate: int = 1
    max_grad_norm: float | None = None
    average: Average | None = None
    guided: bool = False
    skipping: bool = False
    training: bool = True

    def __call__(self, batches: Iterator[Batch], update: int) -> Tensor:
        """Do update number `update`, from 0; return this process's mean loss, a scalar.

        The loss is NaN if it or the gradient is not finite.  Where the check costs no time, on a
        CPU or when such updates are skipped anyway, the weights are then left as they were;
        elsewhere the step is made before the loss reaches the CPU.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(update)
        loss = torch.zeros((), device=self.processes.device)
        for micro in range(self.accumulate):
            loss += self._backward(next(batches), update, micro)
        finite = self._is_finite(loss)
        loss.masked_fill_(~finite, torch.nan)
        if (not self.checks_finite or finite) and self._step() and self.average is not None:
            self.average.update(self.model, update + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    @property
    def checks_finite(self) -> bool:
        """Whether loss and gradient are checked before each step of the optimizer."""
        return self.skipping or self.processes.device.type == "cpu"

    def _backward(self, batch: Batch, update: int, micro: int) -> Tensor:
        images, targets = to_device(batch, self.processes.device)
        if self.mix is not None:
            images, targets = self.mix(images, targets, update=update)
        world = self.processes.world
        index = micro * world + self.processes.rank
        self.seed(update, index)
        with shard(index, world * self.accumulate), self._sync(micro):
            with self.precision.autocast():
                teacher = self.teacher if update >= self.taught_from else None
                taught = () if teacher is None else (teacher(images),)
                outputs = self.forward(images, *[targets] * self.guided)
                loss = self.loss(outputs, targets, *taught) / self.accumulate
            self.precision.scaler.scale(loss).backward()
        return loss.detach()

    def _sync(self, micro: int) -> AbstractContextManager[None]:
        """Average gradients over the processes after the last batch only."""
        if micro + 1 < self.accumulate and isinstance(
            self.forward, nn.parallel.DistributedDataParallel
        ):
            no_sync: AbstractContextManager[None] = self.forward.no_sync()
            return no_sync
        return nullcontext()

    def _step(self) -> bool:
        """Take the step; return whether it was made, which the scaler skips at an overflow."""
        scaler = self.precision.scaler
        if self.max_grad_norm is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        return scaler.get_scale() >= before  # only a skipped step lowers it

    def _is_finite(self, loss: Tensor) -> Tensor:
        """Whether loss and gradient are finite, on all processes: a scalar, bool.

        The gradient is the same on all of them.  Under a loss scale, the scaler itself skips the
        step of a gradient that overflows, and lowers the scale.
        """
        bad = ~loss.isfinite()
        if not self.precision.scaler.is_enabled():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            bad |= ~nn.utils.get_total_norm(gradients).isfinite()
        return self.processes.total(bad.double()) == 0


class Losses:
    """The losses of an epoch, fetched from the device and from the other processes in groups.

    Args:
        step: Makes the updates.
        first: Number of the epoch's first update.
        known: Losses of the updates that are done, NaN for a skipped one.
    """

    def __init__(self, step: TrainStep, first: int, known: Iterable[float] = ()) -> None:
        self._step, self.first = step, first
        self._pending: list[Tensor] = []
        self.values = list(known)

    def __len__(self) -> int:
        """Return how many updates of the epoch are done."""
        return len(self.values) + len(self._pending)

    @property
    def done(self) -> int:
        """Updates done since the start of the run."""
        return self.first + len(self)

    def add(self, loss: Tensor) -> None:
        """Append the loss of the next update."""
        self._pending.append(loss)

    def fetch(self) -> list[float]:
        """Return the losses added since the last fetch, each the mean over the processes.

        Raises:
            DivergedError: If one is not finite, or too many in a row were skipped for it.  All
                processes raise it together, since all see the same sum.
        """
        if not self._pending:
            return []
        processes = self._step.processes
        sums = processes.total(torch.stack(self._pending).double())
        means: list[float] = (sums / processes.world).tolist()
        self._pending.clear()
        for value in means:
            self.values.append(value)
            self._check(value)
        return means

    def _check(self, value: float) -> None:
        if math.isfinite(value):
            return
        row = next(
            (n for n, v in enumerate(self.values[::-1]) if math.isfinite(v)), len(self.values)
        )
        if self._step.skipping and row <= MAX_SKIPPED:
            return
        update = self.first + len(self.values) - 1
        many = f" and {row - 1} before it" if self._step.skipping else ""
        raise DivergedError(
            f"loss or gradient is not finite at update {update}{many}, expected finite numbers; "
            f"the learning rate there is {self._step.lr(update):.3g}",
            update=update,
            loss=value,
        )

    def summary(self) -> Summary:
        """Return mean loss and skipped updates."""
        finite = [value for value in self.values if math.isfinite(value)]
        mean = sum(finite) / len(finite) if finite else math.nan
        return Summary(mean, len(self.values) - len(finite))


def to_device(value: Any, device: torch.device) -> Any:
    """Return a batch, of tensors in tuples, lists and mappings, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(part, device) for part in value)
    return value
