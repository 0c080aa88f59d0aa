"""Classes of single images, from a file of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fambav import data
from fambav.build import batches, entries, saved
from fambav.build.network import model, sketch
from fambav.config import Config
from fambav.data.arrays import IMAGENET_MEAN, IMAGENET_STD
from fambav.engine.checkpoint import CheckpointError, State
from fambav.engine.runtime import processes
from fambav.models import official

Guess = tuple[str, float]

_HEADS = ("head.weight", "head.fc.weight", "fc.weight")


class Pretrained(NamedTuple):
    """A model with the weights of a file, and what the file says of it.

    Attributes:
        source: The file.
        state: What it holds.
        config: The model's settings.
        net: The model, in evaluation mode, on the CPU.
        class_names: Of the classes, in order; None if the file has none.
        mean, std: What the channels of an image are normalised with.
        transform: Makes a tensor of an image, as in evaluation.
    """

    source: Path
    state: State
    config: Config
    net: nn.Module
    class_names: list[str] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Any


def from_pretrained(path: str | Path, **settings: Any) -> nn.Module:
    """Build the model of a file or folder and load its weights.

    Args:
        path: A checkpoint of ours, which knows its own model, a published one of Vim's, which
            needs `model="vim_tiny"` or the like, a `.safetensors` file of ours, a run folder, whose
            best checkpoint is taken, or a folder that `fambav export` wrote as safetensors or hf.
        settings: Settings by the names of main.py's flags, with underscores, such as
            `fusion_strategy="upper", fusion_layer=6, fusion_token=9`: fusion has no weights and
            may differ from what the file was trained with.

    Returns:
        The model in evaluation mode, on the CPU.  Its `pretrained_cfg` says in timm's words what
        images it reads, and has the `label_names`.

    Raises:
        CheckpointError: If the file cannot be used, or does not say what model it is of.
        ConfigError: If a setting is unknown or wrong.
    """
    return opened(path, **settings).net


def opened(path: str | Path, **settings: Any) -> Pretrained:
    """Do what `from_pretrained` does; also return what the file says."""
    source = saved.weights_of(Path(path))
    state = saved.read(source)
    asked = Config.from_flat(settings) if "model" in settings else None
    made_with = _made_with(source, state, asked)
    config = made_with.replace(**settings) if settings else made_with
    net = _loaded(source, state, config)
    mean, std = _statistics(state)
    names = entries.fact(state, "class_names")
    own = getattr(net, "pretrained_cfg", None)
    if isinstance(own, dict):
        told = {"mean": mean, "std": std, "crop_pct": config.data.eval_crop_ratio}
        own = {**own, **told, "label_names": names}
        vars(net).update(pretrained_cfg=own, default_cfg=own)
    transform = _transform(config, state)
    return Pretrained(source, state, config, net, names, mean, std, transform)


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
        path: A file or folder that `from_pretrained` takes.
        images: Image files.
        config: The model of a file that is not ours; a file of ours knows its own and takes none.
        device: `cpu`, `cuda` or None for a GPU if there is one.
        topk: Guesses for each image, at most the number of classes.

    Returns:
        For each image, the names of its likeliest classes with their probabilities, best first.
        Classes without names have numbers.

    Raises:
        CheckpointError: If the file cannot be used, or does not say what model it is of.
        DataError: If an image cannot be read.
    """
    source = saved.weights_of(Path(path))
    state = saved.read(source)
    if config is not None and saved.settings(state) is not None:
        raise CheckpointError(f"{source} says itself what it is of, expected no model beside it")
    made_with = _made_with(source, state, config)
    names = entries.fact(state, "class_names") or [str(n) for n in range(_classes(state))]
    with processes(device) as group:
        net = _loaded(source, state, made_with).to(group.device)
        transform = _transform(made_with, state)
        inputs = [transform(data.read_image(image)) for image in images]
        with torch.no_grad():
            logits = torch.cat([net(x[None].to(group.device)) for x in inputs])
    best = logits.float().softmax(dim=1).topk(min(topk, len(names)), dim=1)
    return [
        [(names[place], share) for share, place in zip(shares, places, strict=True)]
        for shares, places in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _made_with(source: Path, state: State, config: Config | None) -> Config:
    """Return what the file was made with, or `config` if it does not say."""
    found = saved.settings(state) or config
    if found is None:
        raise CheckpointError(
            f"{source} does not say what it is of, expected a file of ours; "
            "name its model with --model, or model= in Python"
        )
    return found


def _loaded(source: Path, state: State, config: Config) -> nn.Module:
    """Build the model with as many classes as the file has, and load the file into it."""
    net = model(config, num_classes=_classes(state))
    saved.put(source, state, net)
    return net.eval()


def _classes(state: State) -> int:
    weights = official(state)
    found = next((weights[n] for n in _HEADS if n in weights), None)
    if found is None:
        raise CheckpointError("checkpoint has no head.weight, expected a classifier")
    return len(found)


def _statistics(state: State) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the channels."""
    mean = entries.fact(state, "mean") or IMAGENET_MEAN
    return tuple(mean), tuple(entries.fact(state, "std") or IMAGENET_STD)


def _transform(config: Config, state: State) -> Any:
    return batches.eval_transform(config, _statistics(state), sketch(config).input_size)
