"""Checks of weights and outputs: dtype, NaN, infinity, and the module where they first appear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fambav.engine.precision import Precision


class NotFiniteError(ValueError):
    """Weights, or what a model makes of images, are not finite."""


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    """Refuse weights that are not what a model computes with.

    Args:
        weights: Of a file, or of the model itself.
        own: The model's state_dict; weights that it does not have are only checked for NaN.

    Raises:
        ValueError: If one is complex or an integer where the model has a real number, or the other
            way round: torch would convert it.
        NotFiniteError: If one is NaN or infinite, or too large for float32.
    """
    for name, value in weights.items():
        known = own.get(name)
        if isinstance(known, Tensor) and _kind(value) != _kind(known):
            raise ValueError(f"dtype of {name} is {value.dtype}, expected {known.dtype}")
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            finite = value.float().isfinite()
            if not finite.all():
                count = int((~finite).sum())
                raise NotFiniteError(
                    f"{name} has {count} numbers of {value.numel()} that are not finite, expected"
                    " none"
                )


@torch.no_grad()
def check_logits(
    model: nn.Module,
    images: Tensor,
    logits: Any,
    what: str,
    *,
    precision: Precision | None = None,
) -> None:
    """Refuse logits that are not finite, and name the module where that begins.

    Args:
        model: In evaluation mode; if need be, it is run again.
        images: Its input, (batch, channels, height, width), on its device.
        logits: Its output, (batch, classes), or a collection of tensors.
        what: The images, in words.
        precision: Format of the forward pass; float32 without one.

    Raises:
        NotFiniteError: If there is one.
    """
    if _is_finite(logits):
        return
    with nullcontext() if precision is None else precision.autocast():
        cause = _cause(model, images)
    raise NotFiniteError(f"logits of {what} are not finite, expected finite numbers; {cause}")


def _cause(model: nn.Module, images: Tensor) -> str:
    """Run a model once more and name the first module whose output is not finite."""
    if not images.isfinite().all():
        return "the images are not either"
    first: list[str] = []

    def check(name: str, module: nn.Module, _: Any, output: Any) -> None:
        if not first and not _is_finite(output):
            first.append(f"{name} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(partial(check, name)) for name, module in _called(model)
    ]
    try:
        model.forward(images)  # not the compiled one
    finally:
        for handle in handles:
            handle.remove()
    if not first:
        return "no module gives such an output alone"
    return f"the first module whose output is not is {first[0]}"


def _called(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside a model by name, but none inside of a mixer.

    A mixer with hooks inside runs unfused, with other rounding.
    """
    for name, module in model.named_children():
        yield f"{prefix}{name}", module
        if not hasattr(module, "unfused"):
            yield from _called(module, f"{prefix}{name}.")


def _is_finite(output: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(output))


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the real tensors of an output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _kind(value: Tensor) -> str:
    return "complex" if value.is_complex() else "real" if value.is_floating_point() else "integer"
