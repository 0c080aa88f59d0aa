"""Accuracy, exact over any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.engine.finite import NotFiniteError, check_logits, check_weights
from fambav.engine.runtime import Precision, Processes

Batch = tuple[Tensor, Tensor]


class Batches(Sized, Protocol):
    """Batches whose number is known."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield them."""


class Scores(NamedTuple):
    """How well a model does on a whole set.

    Attributes:
        acc1: Share of samples whose class is the first guess, in percent.
        acc5: Share whose class is among the first five, in percent.
        loss: Mean cross-entropy, in nats.
        samples: How many were counted, each once.
    """

    acc1: float
    acc5: float
    loss: float
    samples: int

    def line(self) -> str:
        """Return the line that DeiT prints, which tools look for."""
        return f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    processes: Processes,
    precision: Precision,
    take: Callable[[Iterator[Batch]], Batch | None] = lambda stream: next(stream, None),
) -> Scores:
    """Score `model` on every sample of every process.

    Args:
        model: Not wrapped, so that processes may have different numbers of batches; it is left in
            the mode it was in.
        batches: This process's share: images, (batch, channels, height, width), and labels,
            (batch,), int64.  A batch, or a process's whole share, may be of any size.
        processes: Whose shares are added up.
        precision: Format of the forward pass.
        take: Reads a batch, None at the end; every process calls it as often as the others.

    Raises:
        NotFiniteError: If a weight, a logit or a loss of any process is not finite.
        ValueError: If there is no sample at all.
    """
    check_weights(model.state_dict(), {})
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
    stream, spoiled = iter(batches), dict[int, Tensor]()
    try:
        for number in range(processes.largest(len(batches))):
            batch = take(stream)
            if batch is not None and len(batch[1]):
                images, labels = (t.to(processes.device, non_blocking=True) for t in batch)
                with precision.autocast():
                    logits = model(images)
                found = _sums(logits.float(), labels)
                sums, spoiled[number] = sums + found, ~found[0].isfinite()
        loss, first, five, count = processes.total(sums).tolist()
        if not math.isfinite(loss):
            number = next((n for n, own in spoiled.items() if own), -1)
            mine = "" if number < 0 else _told(model, batches, number, processes, precision)
            raise NotFiniteError(next(filter(None, processes.gather(mine))))
    finally:
        model.train(training)
    if count == 0:
        raise ValueError("evaluation set is empty, expected at least one sample")
    return Scores(100 * first / count, 100 * five / count, loss / count, int(count))


def _told(
    model: nn.Module, batches: Batches, number: int, processes: Processes, precision: Precision
) -> str:
    """Say what is not finite about a batch, which is read and run again."""
    what = f"evaluation batch {number}" + f" of process {processes.rank}" * (processes.world > 1)
    images = next(islice(iter(batches), number, None))[0].to(processes.device)
    try:
        with precision.autocast():
            logits = model(images)
        check_logits(model, images, logits, what, precision=precision)
    except NotFiniteError as error:
        return str(error)
    return f"loss of {what} is not finite, expected a finite number"


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, hits among one and among five guesses, and samples of one batch, (4,), float64.

    The loss is NaN if a logit or the loss itself is not finite.
    """
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = guesses == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    loss = loss.masked_fill(~logits.isfinite().all(dim=1), torch.nan)
    counts = (loss, hits[:, 0], hits.any(dim=1), torch.ones_like(loss))
    return torch.stack([count.double().sum() for count in counts])
