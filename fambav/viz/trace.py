"""One image on its way through a model: what each mixer reads, and where each token goes.

A model of stages has a trace for each: every stage starts with all tokens of a grid of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fambav.arguments import refusal
from fambav.layers import Tokens
from fambav.layers.block import Hook, Hooks
from fambav.layers.hierarchy import changed_hooks
from fambav.models import Backbone, Hierarchical
from fambav.ops.cross_scan import kept_order, snake_order

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Pixels = NDArray[np.float64]
Statistics = tuple[Sequence[float], Sequence[float]]


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


class TokenTrace(NamedTuple):
    """The way of one image through a model, or through one of its stages.

    Attributes:
        image: As the model takes it, normalised, (3, height, width).
        pixels: The image as the model sees it, from 0 to 1, (height, width, 3).
        grid: Height and width of the grid of patches.
        cls_index: Where the class tokens stand at the start.
        rank: Step at which the first direction's scan of the whole image meets each patch, row by
            row, (patches,).
        steps: One for each layer.
        logits: Of the image, (classes,).
        prefix: What comes before the number of a layer in its name, such as "2." in a stage.
    """

    image: Tensor
    pixels: Pixels
    grid: tuple[int, int]
    cls_index: tuple[int, ...]
    rank: Ints
    steps: tuple[Step, ...]
    logits: Floats
    prefix: str = ""

    @property
    def start(self) -> int:
        """Tokens before the first layer, class tokens included."""
        return self.grid[0] * self.grid[1] + len(self.cls_index)

    @property
    def kept(self) -> tuple[int, ...]:
        """Tokens at the start and behind each layer, class tokens included."""
        return self.start, *(len(np.unique(s.source[s.source >= 0])) for s in self.steps)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each layer."""
        return tuple(f"{self.prefix}{number}" for number in range(1, len(self.steps) + 1))

    @property
    def share(self) -> float:
        """Tokens that mixers read, as a share of those without reduction."""
        lengths = [len(step.position) for step in self.steps]
        return sum(lengths) / (self.start * len(lengths))


Seen = Tensor | TokenTrace | tuple[TokenTrace, ...]  # an image, or what it does in a model


def trace_tokens(
    model: nn.Module, image: Tensor | TokenTrace, *, statistics: Statistics | None = None
) -> TokenTrace:
    """Send one image through a model as in evaluation; the model and all randomness stay as is.

    Args:
        model: One of ours, of a single stage.
        image: As the model takes it, normalised, (3, height, width); a trace is returned as it is.
        statistics: Mean and standard deviation of the channels that it was normalised with; those
            of the model's `pretrained_cfg` by default.

    Raises:
        ValueError: If the model is not one of ours, or takes no such image.
    """
    if isinstance(image, TokenTrace):
        return image
    if not isinstance(model, Backbone):
        raise _irreducible(model)
    device = _checked(model, image)
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
                    order=_array(_scan_order(model, at_mixer.position)),
                    source=_array(cast(Tensor, tokens.source)[0]),
                )
            )
        logits = model.classify(tokens)
    info = model.info
    whole = torch.arange(info.grid[0] * info.grid[1], device=device)[None]
    cfg = model.pretrained_cfg
    return TokenTrace(
        image=image,
        pixels=_pixels(image, statistics or (cfg["mean"], cfg["std"])),
        grid=info.grid,
        cls_index=info.cls_index,
        rank=_array(_scan_order(model, whole).argsort()),
        steps=tuple(steps),
        logits=_array(logits[0].float()),
    )


def trace_stages(
    model: nn.Module, image: Seen, *, statistics: Statistics | None = None
) -> tuple[TokenTrace, ...]:
    """Send one image through a model, as `trace_tokens` does; return a trace for each stage.

    Args:
        model: One of ours, of one stage or of several.
        image: As of `trace_tokens`; traces are returned as they are.
        statistics: Likewise.

    Raises:
        ValueError: As `trace_tokens`.
    """
    if isinstance(image, tuple) and not isinstance(image, TokenTrace):
        return image
    if isinstance(image, TokenTrace) or not isinstance(model, Hierarchical):
        return (trace_tokens(model, image, statistics=statistics),)
    if not model.reducible:
        raise _irreducible(model)
    seen = [[(list[Tokens](), list[Tokens]()) for _ in blocks] for blocks in model.stages]

    def noting(stage: int, block: int, hooks: Hooks) -> Hooks:
        read, left = seen[stage][block]
        return hooks._replace(
            between=_noting(hooks.between, read), after=_noting(hooks.after, left)
        )

    device = _checked(model, image)
    with evaluating(model), changed_hooks(model.stages, noting):
        logits = _array(model(image[None].to(device))[0].float())
    cfg = model.pretrained_cfg
    pixels = _pixels(image, statistics or (cfg["mean"], cfg["std"]))
    grids = model.grids((image.shape[1], image.shape[2]), **model.config)
    return tuple(
        TokenTrace(
            image=image,
            pixels=pixels,
            grid=grid,
            cls_index=(),
            rank=np.arange(grid[0] * grid[1]),  # the first path is row by row
            steps=tuple(_step(read[0], left[0]) for read, left in blocks),
            logits=logits,
            prefix=f"{number}.",
        )
        for number, (grid, blocks) in enumerate(zip(grids, seen, strict=True), start=1)
    )


def reducing_stages(traces: Sequence[TokenTrace]) -> list[TokenTrace]:
    """Return the stages that remove tokens, or all if none does."""
    return [trace for trace in traces if trace.kept[-1] < trace.start] or list(traces)


def _step(read: Tokens, left: Tokens) -> Step:
    """Return what happens at a layer of a stage, from what its mixer reads and what it leaves."""
    position = _array(read.position[0])
    return Step(
        features=_array(read.x[0].float()),
        position=position,
        order=position.argsort(),
        source=_array(cast(Tensor, left.source)[0]),
    )


def _irreducible(model: nn.Module) -> ValueError:
    return ValueError(
        f"model is a {type(model).__name__}, expected one whose tokens can be reduced"
    )


def _checked(model: nn.Module, image: object) -> torch.device:
    """Return the device of a model; refuse what is no image."""
    if not isinstance(image, Tensor) or image.ndim != 3:
        given = tuple(image.shape) if isinstance(image, Tensor) else image
        raise refusal("image", given, "a tensor (channels, height, width)")
    return next(model.parameters()).device


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
        seen.append(given.kept())
        return given

    return hook


def _scan_order(model: Backbone, position: Tensor) -> Tensor:
    """Return the tokens in the order of the first direction's scan, (length,)."""
    if not model.info.needs_positions:  # a sequence is scanned as it stands
        return torch.arange(position.shape[1])
    return kept_order(snake_order(model.info.grid, position.device), position).order[0, 0]


def _pixels(image: Tensor, statistics: Statistics) -> Pixels:
    """Undo the normalisation of an image, (3, height, width) -> (height, width, 3)."""
    mean, std = (torch.tensor(each)[:, None, None] for each in statistics)
    pixels: Pixels = (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).double().numpy()
    return pixels


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array
