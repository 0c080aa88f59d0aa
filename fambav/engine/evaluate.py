"""Evaluation, exact over any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fambav.engine.distributed import Processes
from fambav.engine.finite import NotFiniteError, check_logits, check_weights
from fambav.engine.precision import Precision
from fambav.engine.step import Batch, to_device
from fambav.tasks import Meter, Scores


class Batches(Sized, Protocol):
    """Batches whose number is known."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield them."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    meter: Meter,
    processes: Processes,
    precision: Precision,
    take: Callable[[Iterator[Batch]], Batch | None] = lambda stream: next(stream, None),
    each: Callable[[Any, Any], None] = lambda outputs, targets: None,
) -> Scores:
    """Evaluate `model` on every sample of every process.

    Args:
        model: Not wrapped, so that processes may have different numbers of batches; it is left in
            the mode it was in.
        batches: This process's share: images, (batch, channels, height, width), and targets.  A
            batch, or a process's whole share, may be of any size.
        meter: An empty one, on the device.
        processes: Their shares are added up.
        precision: Format of the forward pass.
        take: Reads a batch, None at the end; every process calls it as often as the others.
        each: Gets the outputs and targets of every batch of this process, in order.

    Raises:
        NotFiniteError: If a weight, an output or a loss of any process is not finite.
        ValueError: If there is no sample at all.
    """
    check_weights(model.state_dict(), {})
    training = model.training
    model.eval()
    stream, finite = iter(batches), dict[int, Tensor]()
    try:
        for number in range(processes.largest(len(batches))):
            batch = take(stream)
            if batch is not None and len(batch[1]):
                images, targets = to_device(batch, processes.device)
                with precision.autocast():
                    outputs = model(images)
                finite[number] = meter.update(outputs, targets)
                each(outputs, targets)
        if not processes.total(meter.sums).isfinite().all():
            number = next((n for n, own in finite.items() if not own), -1)
            cause = "" if number < 0 else _cause(model, batches, number, processes, precision)
            raise NotFiniteError(next(filter(None, processes.gather(cause))))
        meter.share(processes.gather)
    finally:
        model.train(training)
    if meter.sums[-1] == 0:
        raise ValueError("evaluation set is empty, expected at least one sample")
    return meter.scores()


def _cause(
    model: nn.Module, batches: Batches, number: int, processes: Processes, precision: Precision
) -> str:
    """Describe what is not finite about a batch, which is read and run again."""
    what = f"evaluation batch {number}" + f" of process {processes.rank}" * (processes.world > 1)
    images, _ = to_device(next(islice(iter(batches), number, None)), processes.device)
    try:
        with precision.autocast():
            logits = model(images)
        check_logits(model, images, logits, what, precision=precision)
    except NotFiniteError as error:
        return str(error)
    return f"loss of {what} is not finite, expected a finite number"
