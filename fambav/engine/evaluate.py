"""Accuracy, exact over any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        ValueError: If there is no sample at all.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
    stream = iter(batches)
    try:
        for _ in range(processes.largest(len(batches))):
            batch = take(stream)
            if batch is not None and len(batch[1]):
                images, labels = (t.to(processes.device, non_blocking=True) for t in batch)
                with precision.autocast():
                    logits = model(images)
                sums += _sums(logits.float(), labels)
    finally:
        model.train(training)
    loss, first, five, count = processes.total(sums).tolist()
    if count == 0:
        raise ValueError("evaluation set is empty, expected at least one sample")
    return Scores(100 * first / count, 100 * five / count, loss / count, int(count))


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, hits among one and among five guesses, and samples of one batch, (4,), float64."""
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = guesses == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    counts = (loss, hits[:, 0], hits.any(dim=1), torch.ones_like(loss))
    return torch.stack([count.double().sum() for count in counts])
