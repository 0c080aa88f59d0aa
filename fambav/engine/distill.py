"""Distillation: a teacher's share of the loss, beside that of the labels.

    soft   (1 - alpha) base + alpha tau^2 / classes KL(q || p)   p, q at temperature tau
    hard   (1 - alpha) base + alpha CE(p, argmax q)
    kl     base + alpha KL(q || p)
    mesa   base + alpha CE(p, q)      from some update on; the teacher is the model's moving average

base is the mean loss of (logits, targets), and each result is one of (logits, targets, teacher's
logits).  p are the probabilities of the model in training, q those of its teacher, and KL and CE
are means over the batch.  KL(q || p) = sum q (log q - log p), with the expectation under the
teacher, so the model is drawn to every class to which the teacher gives some probability.

Source: soft and hard, Touvron et al., "Training data-efficient image transformers", DeiT,
arXiv:2012.12877, as its code computes them, which divides by the number of elements and so by
the classes too.  There the model has a second head for the teacher; here p are the probabilities of
that head if a model returns two outputs, as DeiT's and GroupMamba's do, else of its one head.
kl, R-MeeTo, "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training",
arXiv:2412.12496, as its code computes it, with alpha 0.5.
mesa, Du et al., "Sharpness-Aware Training for Free", arXiv:2205.14083, as VSSD's code computes it,
with alpha 1 to 2 from a quarter of the epochs on.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav.engine.step import DistillationLoss, Loss

Outputs = Tensor | tuple[Tensor, Tensor]  # of one head, or of a second one for the teacher too


class Teacher:
    """A frozen model.

    It is in evaluation mode, without random numbers, and its weights need no gradient.
    (R-MeeTo's released code leaves its teacher in training mode, with blocks skipped at random.)

    Args:
        net: Maps images, (batch, channels, height, width), to logits, (batch, classes).  It is
            frozen in place, and is not to be shared with the model in training.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of `images`, (batch, classes), cut off from every gradient."""
        logits: Tensor = self.net(images)
        return logits

    def digest(self) -> str:
        """Return the SHA-256 of the names, shapes and values of its weights, in hexadecimal."""
        digest = hashlib.sha256()
        for name, value in self.net.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def soft(base: Loss, *, alpha: float, tau: float) -> DistillationLoss:
    """Return DeiT's soft distillation; alpha is in (0, 1], the temperature tau above 0."""

    def loss(outputs: Outputs, targets: Tensor, taught: Tensor) -> Tensor:
        logits, learned = heads(outputs)
        distance = divergence(learned / tau, taught / tau) * tau**2 / logits.shape[1]
        return (1 - alpha) * base(logits, targets) + alpha * distance

    return loss


def hard(base: Loss, *, alpha: float) -> DistillationLoss:
    """Return DeiT's hard distillation; alpha is in (0, 1]."""

    def loss(outputs: Outputs, targets: Tensor, taught: Tensor) -> Tensor:
        logits, learned = heads(outputs)
        guess = F.cross_entropy(learned, taught.argmax(dim=1))
        return (1 - alpha) * base(logits, targets) + alpha * guess

    return loss


def kl(base: Loss, *, alpha: float) -> DistillationLoss:
    """Return R-MeeTo's loss, in which the labels keep their whole weight; alpha is above 0."""

    def loss(logits: Tensor, targets: Tensor, taught: Tensor) -> Tensor:
        return base(logits, targets) + alpha * divergence(logits, taught)

    return loss


def mesa(base: Loss, *, alpha: float) -> DistillationLoss:
    """Return MESA's loss, in which the labels keep their whole weight; alpha is above 0.

    Without the teacher's logits, before it sets in, it is base.
    """

    def loss(logits: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        if taught is None:
            return base(logits, targets)
        probabilities = taught.to(torch.promote_types(taught.dtype, torch.float32)).softmax(dim=1)
        return base(logits, targets) + alpha * F.cross_entropy(logits, probabilities)

    return loss


def heads(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Return what a model says for the labels and for its teacher; both, if it has one head."""
    return (outputs, outputs) if isinstance(outputs, Tensor) else outputs


def divergence(logits: Tensor, taught: Tensor) -> Tensor:
    """Return KL(q || p), the mean over the batch, in nats.

    Args:
        logits: Of the model in training, (batch, classes); p is their softmax.
        taught: Of the teacher, (batch, classes); q is their softmax.

    Returns:
        A scalar of at least 32 bits, whatever the logits have; at least 0.
    """
    p, q = (
        F.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
        for x in (logits, taught)
    )
    return F.kl_div(p, q, reduction="batchmean", log_target=True)
