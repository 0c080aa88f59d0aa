"""The largest activation of each layer: what a low precision has to represent."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class ActivationMax:
    """The largest magnitudes of layers' outputs in training, kept on the device.

    Args:
        layers: Each returns a tensor, or a tuple with some.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        hooked = list(layers)
        self._maxima: list[Tensor | None] = [None] * len(hooked)
        for index, layer in enumerate(hooked):
            layer.register_forward_hook(partial(self._update, index))

    def take(self) -> list[float]:
        """Return the maxima since the last call, one for each layer; 0 for a layer not called."""
        values = [0.0 if maximum is None else float(maximum) for maximum in self._maxima]
        self._maxima = [None] * len(values)
        return values

    @torch.no_grad()
    def _update(self, index: int, module: nn.Module, _: Any, output: Any) -> None:
        if not module.training:
            return
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, Tensor) and part.is_floating_point():
                largest = part.detach().abs().max().float()
                before = self._maxima[index]
                self._maxima[index] = largest if before is None else torch.maximum(before, largest)
