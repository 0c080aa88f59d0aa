"""How large activations become, layer by layer: what low precision has to hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Maxima:
    """The largest magnitudes that layers have put out while training, without waiting for them.

    Args:
        layers: Each puts out a tensor, or a tuple with some.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        self._found: list[Tensor | None] = [None] * len(self._layers)
        for place, layer in enumerate(self._layers):
            layer.register_forward_hook(
                lambda module, _, output, place=place: self._note(module, output, place)
            )

    def take(self) -> list[float]:
        """Return the maxima since the last call, one for each layer; 0 where there was nothing."""
        values = [0.0 if found is None else float(found) for found in self._found]
        self._found = [None] * len(self._layers)
        return values

    @torch.no_grad()
    def _note(self, module: nn.Module, output: Any, place: int) -> None:
        if not module.training:
            return
        parts = output if isinstance(output, tuple) else (output,)
        for part in parts:
            if isinstance(part, Tensor) and part.is_floating_point():
                largest = part.detach().abs().max().float()
                before = self._found[place]
                self._found[place] = largest if before is None else torch.maximum(before, largest)
