"""Classes of single images, from a file of weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from fambav import data
from fambav.config import Config, affecting, read_settings, refuse
from fambav.data.arrays import IMAGENET_MEAN, IMAGENET_STD
from fambav.engine.checkpoint import CheckpointError, State
from fambav.engine.distributed import processes
from fambav.engine.finite import check_logits
from fambav.models import Backbone, official
from fambav.training import batches, entries, saved
from fambav.training.network import model, sketch

Guess = tuple[str, float]

_HEADS = ("head.weight", "head.fc.weight", "fc.weight")
# Settings that a file of weights leaves open.
_OPEN = affecting("model") - {"legacy_init"} | {"grad_checkpointing"}


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
        settings: Settings of the model by the names of main.py's flags, with underscores, such as
            `fusion_strategy="upper", fusion_layer=6, fusion_token=9`: fusion has no weights and
            may differ from what the file was trained with.  Another `num_classes` makes a new
            head, drawn from torch's global generator.

    Returns:
        The model in evaluation mode, on the CPU.  Its `pretrained_cfg` says in timm's words what
        images it reads, as evaluation makes them, and has the `label_names`.

    Raises:
        CheckpointError: If the file cannot be used, or does not say what model it is of.
        NotFiniteWeightsError: If a weight is not finite.
        ConfigError: If a setting is unknown, wrong, or means nothing beside weights.

    Warns:
        UserWarning: If the head is new.
    """
    return load_run(path, **settings).net


def load_run(path: str | Path, **settings: Any) -> Pretrained:
    """Do what `from_pretrained` does; also return what the file says."""
    for name, value in read_settings(settings).items():
        if name not in _OPEN:
            refuse(name, value, "no such setting here, where it would change nothing")
    found = opened(path, **settings)
    small = found.net.pretrained_cfg["crop_mode"] == "squash"  # type: ignore[index]
    if small and "eval_crop_ratio" in settings:
        refuse("eval_crop_ratio", settings["eval_crop_ratio"], "none: images so small are not cut")
    return found


def opened(path: str | Path, **settings: Any) -> Pretrained:
    """Do what `load_run` does, without a look at the settings."""
    source = saved.weights_of(Path(path))
    state = saved.read(source)
    asked = Config.from_flat(settings) if "model" in settings else None
    made_with = _made_with(source, state, asked)
    config = made_with.replace(**settings) if settings else made_with
    net = _loaded(source, state, config, classes=settings.get("num_classes"))
    mean, std = _statistics(state)
    names = entries.fact(state, "class_names")
    if names is not None and len(names) != net.num_classes:
        names = None
    size = sketch(config).input_size
    own = {
        **cast(dict[str, Any], net.pretrained_cfg),
        **data.eval_words(size, config.data.eval_crop_ratio),
        "input_size": (_channels(net), *size),
        "num_classes": net.num_classes,
        "mean": mean,
        "std": std,
        "label_names": names,
    }
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
        NotFiniteError: If a logit is not finite; NotFiniteWeightsError: if a weight is not.
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
        for image, x, row in zip(images, inputs, logits, strict=True):
            check_logits(net, x[None].to(group.device), row, str(image))
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


def _loaded(source: Path, state: State, config: Config, *, classes: int | None = None) -> nn.Module:
    """Build the model and load the file into it.

    Args:
        source: The file.
        state: What it holds.
        config: What the model is.
        classes: Length of the output, with a new head if the file's differs; None for the file's.
    """
    there, said = _classes(state), config.model.num_classes
    if classes is None and said not in (None, there):
        raise CheckpointError(f"num_classes is {said}, expected {there} as {source} has")
    net = model(config, num_classes=classes or there)
    saved.put(source, state, net, head="strict" if classes is None else "drop")
    if classes not in (None, there):
        warnings.warn(
            f"num_classes is {classes} and {source} has {there}: the head is new, with weights"
            " drawn at random",
            stacklevel=5,
        )
    return net.eval()


def _classes(state: State) -> int:
    weights = official(state)
    found = next((weights[n] for n in _HEADS if n in weights), None)
    if found is None:
        raise CheckpointError("checkpoint has no head.weight, expected a classifier")
    return len(found)


def _channels(net: nn.Module) -> int:
    if isinstance(net, Backbone):
        return int(net.patch_embed.in_chans)
    return int(net.pretrained_cfg["input_size"][0])  # type: ignore[index]  # timm sets it


def _statistics(state: State) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the channels."""
    mean = entries.fact(state, "mean") or IMAGENET_MEAN
    return tuple(mean), tuple(entries.fact(state, "std") or IMAGENET_STD)


def _transform(config: Config, state: State) -> Any:
    return batches.eval_transform(config, _statistics(state), sketch(config).input_size)
