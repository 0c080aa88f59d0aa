"""The tokens that travel through a model, and what is known about each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """A batch of token sequences of equal length on its way through a model.

    Attributes:
        x: Output of the last mixer or input of the next, (batch, length, dim).
        residual: Sum of the mixer outputs before it, (batch, length, dim); None before layer 0.
        size: Patches behind each token, 1 for a class token, (batch, length), float32.
        position: Place at the start of the token, or of the token that absorbed the others of its
            group, (batch, length), int64.
        class_places: Where the k class tokens are now, exact for each sample, (batch, k), int64.
        source: Place now of the token that each token of the start is part of,
            (batch, start length), int64; None unless tracing.
    """

    x: Tensor
    residual: Tensor | None
    size: Tensor
    position: Tensor
    class_places: Tensor
    source: Tensor | None = None

    @classmethod
    def start(cls, x: Tensor, *, class_places: tuple[int, ...], trace: bool = False) -> Tokens:
        """Wrap embedded tokens.

        Args:
            x: The embedded sequence, class tokens included, (batch, length, dim).
            class_places: Where the class tokens stand; empty without one.
            trace: Carry `source`, which says where each token of the start went.

        Returns:
            Tokens of size 1, each at its own position, without a residual.
        """
        batch, length, _ = x.shape
        position = torch.arange(length, device=x.device).expand(batch, length)
        places = (position[:, place : place + 1] for place in class_places)
        return cls(
            x=x,
            residual=None,
            size=torch.ones(batch, length, device=x.device),
            position=position,
            class_places=torch.cat((position[:, :0], *places), dim=1),
            source=position if trace else None,
        )
