"""Mixup and CutMix, drawn once for an update.

Source: Zhang et al., "mixup", arXiv:1710.09412; Yun et al., "CutMix", arXiv:1905.04899; timm's
implementation, whose boxes of an odd side are one pixel larger than in timm 0.4, which DeiT used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fambav.seeding import key
from fambav.timm_compat import timm


class Mix:
    """Mixes a batch with itself reversed, as timm does, the same way on every process.

    Args:
        inner: timm's Mixup.
        seed: Seed of the run.
    """

    def __init__(self, inner: Any, *, seed: int) -> None:
        self.inner, self.seed = inner, seed

    def __call__(self, images: Tensor, targets: Tensor, *, update: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        The draws depend on the seed and the update alone, so every process and micro-batch of an
        update takes the same share and the same box; samples are paired within the batch.

        Args:
            images: (batch, 3, height, width); changed in place.
            targets: Labels, (batch,), int64.
            update: Number of the update, from 0.

        Returns:
            The images, and targets (batch, classes), float32, smoothed.
        """
        np.random.seed(key(self.seed, "mixup", update) % 2**32)
        mixed: tuple[Tensor, Tensor] = self.inner(images, targets)
        return mixed


def mixup(
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    cutmix_minmax: Sequence[float] | None = None,
    mixup_prob: float = 1.0,
    mixup_switch_prob: float = 0.5,
    mixup_mode: str = "batch",
    smoothing: float = 0.1,
) -> Mix | None:
    """Return what mixes the batches of a run.

    Args:
        num_classes: Length of a target.
        batch_size: Samples in a micro-batch of one process.
        seed: Seed of the run.
        mixup: Mixup's alpha, 0 for none.
        cutmix: CutMix's alpha, 0 for none.
        cutmix_minmax: Least and largest side of the box as a share of the image's; turns CutMix on.
        mixup_prob: Probability of mixing a batch.
        mixup_switch_prob: Probability of CutMix where both are on.
        mixup_mode: "batch", "pair" or "elem": what draws a share of its own.
        smoothing: Label smoothing, in [0, 1).

    Returns:
        The mixing, or None if mixup and cutmix are both off.

    Raises:
        ValueError: If the batch is odd, or cutmix_minmax is no span within [0, 1].
    """
    if not (mixup > 0 or cutmix > 0 or cutmix_minmax is not None):
        return None
    if batch_size % 2:
        raise ValueError(
            f"batch_size is {batch_size}, expected an even number, because mixup and cutmix mix a "
            "batch with itself reversed; or switch both off with --mixup 0 --cutmix 0"
        )
    if cutmix_minmax is not None:
        span = tuple(cutmix_minmax)
        if len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
            raise ValueError(
                f"cutmix_minmax is {list(span)}, expected two rising numbers in 0 .. 1"
            )
    inner = timm.data.Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        cutmix_minmax=cutmix_minmax,
        prob=mixup_prob,
        switch_prob=mixup_switch_prob,
        mode=mixup_mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )
    return Mix(inner, seed=seed)
