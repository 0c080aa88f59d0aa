"""Classes of single images, from a file of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fambav import data
from fambav.build import batches, saved
from fambav.build.network import model, sketch
from fambav.config import Config
from fambav.data.arrays import IMAGENET_MEAN, IMAGENET_STD
from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError, State
from fambav.engine.runtime import processes
from fambav.models import official

Guess = tuple[str, float]


def predict(
    path: str | Path,
    images: Sequence[str | Path],
    *,
    config: Config | None = None,
    device: str | None = None,
    topk: int = 5,
) -> list[list[Guess]]:
    """Classify images.

    Args:
        path: A checkpoint or a `.safetensors` file.
        images: Image files.
        config: The model of a file that is not ours; a file of ours knows its own.
        device: `cpu`, `cuda` or None for a GPU if there is one.
        topk: Guesses for each image, at most the number of classes.

    Returns:
        For each image, the names of its likeliest classes with their probabilities, best first.
        Classes without names have numbers.

    Raises:
        CheckpointError: If the file cannot be used, or does not say what model it is of.
        DataError: If an image cannot be read.
    """
    source = Path(path)
    state = checkpoint.load(source)
    made_with = saved.settings(state) or config
    if made_with is None:
        hint = "name its model with --model"
        raise CheckpointError(
            f"{source} does not say what it is of, expected a file of ours; {hint}"
        )
    names = saved.fact(state, "class_names") or [str(n) for n in range(_classes(state))]
    with processes(device) as group:
        net = model(made_with, num_classes=len(names))
        saved.put(source, state, net)
        net.eval().to(group.device)
        transform = _transform(made_with, state)
        inputs = [transform(data.read_image(image)) for image in images]
        with torch.no_grad():
            logits = torch.cat([net(x[None].to(group.device)) for x in inputs])
    best = logits.float().softmax(dim=1).topk(min(topk, len(names)), dim=1)
    return [
        [(names[place], share) for share, place in zip(shares, places, strict=True)]
        for shares, places in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _classes(state: State) -> int:
    weights = official(state)
    found = next((weights[n] for n in ("head.weight", "fc.weight") if n in weights), None)
    if found is None:
        raise CheckpointError("checkpoint has no head.weight, expected a classifier")
    return len(found)


def _transform(config: Config, state: State) -> Any:
    statistics = (
        saved.fact(state, "mean") or IMAGENET_MEAN,
        saved.fact(state, "std") or IMAGENET_STD,
    )
    return batches.eval_transform(config, statistics, sketch(config).input_size)
