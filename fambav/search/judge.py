"""How far a plan leads a model away from what it says with all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.engine.finite import NotFiniteError, check_logits
from fambav.engine.precision import Precision
from fambav.models import Backbone
from fambav.reduction import no_reduction
from fambav.search.space import Counts, Plan, Space
from fambav.search.walk import logits

OBJECTIVES = ("distance", "accuracy")


class Verdict(NamedTuple):
    """What a plan does on the images of a search.

    Attributes:
        loss: The smaller the better; 0 or more.
        metric: Share of images whose class is the first guess, in percent.
    """

    loss: float
    metric: float


class Judge:
    """Judges plans on fixed images, each plan once.

    Args:
        net: In evaluation mode, on its device.
        batches: Images, (batch, channels, height, width), on that device.
        labels: Their classes, (images,), int64, there too.
        objective: "distance", the mean Kullback-Leibler divergence from the guesses of the model
            with all tokens, in nats; or "accuracy", the share of wrong first guesses, to which the
            mean cross-entropy over the number of images is added, so that of plans equally often
            wrong the surer one wins.
        precision: Format of the forward pass.

    Attributes:
        verdicts: All verdicts so far, in the order in which plans were judged.
    """

    def __init__(
        self,
        net: Backbone,
        batches: Sequence[Tensor],
        labels: Tensor,
        *,
        objective: str,
        precision: Precision,
    ) -> None:
        self.net, self.batches, self.labels = net, batches, labels
        self.objective, self.precision = objective, precision
        self.verdicts: dict[Plan, Verdict] = {}
        (said,) = logits(net, batches, [no_reduction(net.info).eval()], precision)
        for images, own in zip(batches, said.split([len(b) for b in batches]), strict=True):
            check_logits(net, images, own, "the images of the search", precision=precision)
        self.dense = said.double().log_softmax(dim=1)

    def losses(self, space: Space, plans: Sequence[Counts]) -> list[float]:
        """Return the loss of each plan; those not judged before are judged together.

        Raises:
            NotFiniteError: If a logit is not finite.
        """
        named = [Plan(space.method, counts) for counts in plans]
        new = [plan for plan in dict.fromkeys(named) if plan not in self.verdicts]
        if new:
            made = [space.reduction(plan.counts) for plan in new]
            said = logits(self.net, self.batches, made, self.precision)
            for plan, own in zip(new, said, strict=True):
                if not own.isfinite().all():
                    raise NotFiniteError(
                        f"logits under {plan.method} {plan.told()} are not finite, expected finite"
                        " numbers"
                    )
                self.verdicts[plan] = self._verdict(own)
        return [self.verdicts[plan].loss for plan in named]

    def _verdict(self, said: Tensor) -> Verdict:
        guesses = said.double().log_softmax(dim=1)
        wrong = (guesses.argmax(dim=1) != self.labels).double().mean().item()
        if self.objective == "distance":
            loss = F.kl_div(guesses, self.dense, log_target=True, reduction="batchmean")
        else:
            loss = wrong + F.nll_loss(guesses, self.labels) / len(self.labels)
        return Verdict(max(float(loss), 0.0), 100 * (1 - wrong))


def batched(images: Tensor, size: int) -> list[Tensor]:
    """Divide images into batches of at most `size`."""
    return list(torch.split(images, size))
