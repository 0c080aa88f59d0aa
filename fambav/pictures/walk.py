"""One image on its way through a model: what each layer reads, and where its tokens went."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fambav.layers import Tokens
from fambav.layers.block import Hook
from fambav.models import Backbone
from fambav.ops.scan_order import among, snakes

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Step(NamedTuple):
    """What happens at one layer.

    Attributes:
        features: Normalised tokens that the mixer reads, in their sequence, (length, dim).
        position: Place at the start of each of them, (length,).
        order: Which of them is scanned first, second and so on in the mixer's first direction,
            (length,).
        source: Place behind the layer of the token that each token of the start is part of, -1 if
            it was dropped, (start length,).
    """

    features: Floats
    position: Ints
    order: Ints
    source: Ints


class Walk(NamedTuple):
    """The way of one image.

    Attributes:
        grid: Height and width of the grid of patches.
        class_places: Where the class tokens stand at the start.
        rank: Step at which the first direction's scan of the whole image meets each patch, row by
            row, (patches,).
        steps: One for each layer.
        logits: What the model says, (classes,).
    """

    grid: tuple[int, int]
    class_places: tuple[int, ...]
    rank: Ints
    steps: tuple[Step, ...]
    logits: Floats

    @property
    def start(self) -> int:
        """Tokens before the first layer, class tokens included."""
        return self.grid[0] * self.grid[1] + len(self.class_places)

    @property
    def left(self) -> tuple[int, ...]:
        """Tokens at the start and behind each layer, class tokens included."""
        return self.start, *(len(np.unique(s.source[s.source >= 0])) for s in self.steps)


def follow(model: nn.Module, image: Tensor) -> Walk:
    """Send one image through a model as in evaluation; the model and all randomness stay as is.

    Args:
        model: One of ours.
        image: As the model takes it, (in_chans, height, width).

    Returns:
        What was seen on the way.

    Raises:
        ValueError: If the model is not one of ours, or takes no such image.
    """
    if not isinstance(model, Backbone):
        raise ValueError(
            f"model is a {type(model).__name__}, expected one whose tokens can be reduced"
        )
    device = next(model.parameters()).device
    with evaluating(model):
        tokens, steps = model.embed(image[None].to(device), trace=True), []
        for layer, block in enumerate(model.layers):
            seen: list[Tokens] = []
            hooks = model.hooks(layer, tokens)
            tokens = block(tokens, hooks._replace(between=_noting(hooks.between, seen)))
            (at_mixer,) = seen
            steps.append(
                Step(
                    features=_array(at_mixer.x[0].float()),
                    position=_array(at_mixer.position[0]),
                    order=_array(_scanned(model, at_mixer.position)),
                    source=_array(_known(tokens.source)[0]),
                )
            )
        logits = model.classify(tokens)
    info = model.info
    whole = torch.arange(info.grid[0] * info.grid[1], device=device)[None]
    rank = _array(_scanned(model, whole).argsort())
    return Walk(info.grid, info.cls_index, rank, tuple(steps), _array(logits[0].float()))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation without gradients, and back into what it was at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _noting(between: Hook, seen: list[Tokens]) -> Hook:
    """Return a hook that does the same and keeps what the mixer gets."""

    def hook(tokens: Tokens) -> Tokens:
        given = between(tokens)
        seen.append(given.living())
        return given

    return hook


def _scanned(model: Backbone, position: Tensor) -> Tensor:
    """Return the tokens in the order of the first direction's scan, (length,)."""
    if not model.info.needs_positions:  # a sequence is scanned as it stands
        return torch.arange(position.shape[1])
    return among(snakes(model.info.grid, position.device), position).order[0, 0]


def _known(source: Tensor | None) -> Tensor:
    if source is None:
        raise ValueError("tokens have no source, expected a model that traces them")
    return source


def _array(tensor: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = tensor.cpu().numpy()
    return found
