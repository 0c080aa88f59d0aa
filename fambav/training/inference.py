"""Trained models: loaded from a run, an exported folder or a file, and run on images."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import nn

from fambav import data
from fambav.arguments import file_path, file_paths, whole
from fambav.config import Config, affecting, read_settings, refuse
from fambav.data.types import IMAGENET_MEAN, IMAGENET_STD
from fambav.engine.checkpoint import CheckpointError
from fambav.engine.distributed import processes
from fambav.engine.finite import check_logits
from fambav.engine.run_dir import weights_file
from fambav.ops import check_environment
from fambav.tasks import Task, task_of
from fambav.training import batches
from fambav.training.network import layout, model
from fambav.training.run_state import RunState

Guess = tuple[str, float]

# Settings of a model that its weights leave open.
OPEN = affecting("model") - {"legacy_init"} | {"grad_checkpointing"}
# Settings of where and how fast a model is evaluated, not of what it is.
FREE = {
    "data_path",
    "download",
    "device",
    "num_workers",
    "threads",
    "scan_backend",
    "amp",
    "amp_dtype",
    "matmul_precision",
    "deterministic",
}


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A model with the weights of a file, and what the file says of it.

    Attributes:
        state: The file.
        config: The settings that the model is built from, with those of its data.
        net: The model, in evaluation mode, on the CPU.  Its `pretrained_cfg` describes the images
            that evaluation makes, in timm's words.
        class_names: Of the classes, in order; None if the file has none.
        mean, std: What the channels of an image are normalised with.
        transform: Makes a tensor of an image, as in evaluation.
    """

    state: RunState
    config: Config
    net: nn.Module
    class_names: list[str] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Any

    @property
    def source(self) -> Path:
        """The file of weights."""
        return self.state.path

    @property
    def num_classes(self) -> int:
        """Length of the output."""
        return int(cast(Any, self.net).num_classes)

    @property
    def input_size(self) -> tuple[int, ...]:
        """Shape of an input: channels, height and width, or lookback and variates."""
        return tuple(cast(Any, self.net).pretrained_cfg["input_size"])

    @property
    def task(self) -> Task:
        """What the model has learnt."""
        return task_of(self.config.data.data_set)

    def outputs_of(self, called: nn.Module, image: Image.Image, *, what: str) -> torch.Tensor:
        """Return what the model makes of an image.

        Args:
            called: The model as its task's `inference` returns it.
            image: In RGB.
            what: The image, in words.

        Raises:
            NotFiniteError: If an output is not finite.
        """
        x = self.transform(image)[None].to(next(called.parameters()).device)
        outputs: torch.Tensor = called(x)
        check_logits(called, x, outputs, what)
        return outputs

    def check_images(self) -> None:
        """Refuse a model of anything but images.

        Raises:
            ValueError: If it is one.
        """
        if len(self.input_size) != 3:
            name, data_set = self.config.model.model, self.config.data.data_set
            raise ValueError(f"model is {name} of {data_set}, expected one that reads images")

    def check_classes(self) -> None:
        """Refuse a model that does not classify images.

        Raises:
            ValueError: If it is one.
        """
        if not self.task.classes:
            name, data_set = self.config.model.model, self.config.data.data_set
            raise ValueError(f"model is {name} of {data_set}, expected a classifier of images")


def from_pretrained(path: str | Path, **settings: Any) -> nn.Module:
    """Build the model of a file or folder and load its weights.

    Args:
        path: A checkpoint of ours, which knows its own model, a published one of Vim's, which
            needs `model="vim_tiny"` or the like, a `.safetensors` file of ours, a run folder, whose
            best checkpoint is taken, or a folder that `fambav export` wrote as safetensors or hf.
            The weights are those that were scored for it, not their moving average.
        settings: Settings of the model by the names of main.py's flags, with underscores, such as
            `fusion_strategy="upper", fusion_layer=6, fusion_token=9`: fusion has no weights and
            may differ from what the file was trained with.  Another `num_classes` makes a new
            head, drawn from torch's global generator.

    Returns:
        The model in evaluation mode, on the CPU.  Its `pretrained_cfg` says in timm's words what
        images it reads, as evaluation makes them, and has the `label_names`.

    Raises:
        ValueError: If path is no path.
        CheckpointError: If the file cannot be used, or does not say what model it is of.
        NotFiniteWeightsError: If a weight is not finite.
        ConfigError: If a setting is unknown, wrong, or means nothing beside weights.

    Warns:
        UserWarning: If the head is new.
    """
    return load_run(path, settings).net


def load_run(
    path: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    config: Config | None = None,
    allowed: Collection[str] = OPEN,
) -> LoadedRun:
    """Open a run, an exported folder or a file of weights, as every command does.

    Args:
        path: As in `from_pretrained`; `engine.run_dir.weights_file` says what a folder means.
        settings: Settings that differ from those of the file, or what a file is of that does not
            say it, then with `model`.
        config: Settings of a file that does not say its own; refused beside one that does.
        allowed: Names that `settings` may have.

    Raises:
        BackendError: If the environment forces a scan that cannot run.
        As `from_pretrained`.
    """
    check_environment()
    changes = read_settings(settings or {})
    for name, value in changes.items():
        if name not in allowed:
            known = "beside weights that know theirs"
            why = known if name in OPEN else "here, where it would change nothing"
            refuse(name, value, f"no such setting {why}")
    state = RunState.read(weights_file(file_path("path", path)))
    if state.config is not None and config is not None:
        raise CheckpointError(
            f"{state.path} says itself what it is of, expected no model beside it"
        )
    given = Config.from_flat(changes) if "model" in changes else config
    trained = state.config or given
    if trained is None:
        raise CheckpointError(
            f"{state.path} does not say what it is of, expected a file of ours; name its model with"
            " --model, or model= in Python, and its data with --data-set"
        )
    used = trained.replace(**changes) if changes else trained
    laid_out = layout(used)
    size = laid_out.input_size
    task = task_of(used.data.data_set)
    words = task.input_words(used, size)
    if "eval_crop_ratio" in changes and words["crop_mode"] == "squash":
        refuse("eval_crop_ratio", changes["eval_crop_ratio"], "none: images so small are not cut")
    there = state.num_classes(laid_out.net)
    net = _build(state, used, there=there, classes=changes.get(task.output))
    return _described(net, state, used, size, words)


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
    whole("topk", topk, least=1, most=sys.maxsize)  # no size: there are as many as classes
    files = file_paths("images", images)
    with processes(device) as group, torch.no_grad():
        run = load_run(path, config=config)
        run.check_classes()
        names = run.class_names or [str(number) for number in range(run.num_classes)]
        net = run.net.to(group.device)
        inputs = [run.transform(data.read_image(file))[None] for file in files]
        logits = torch.cat([net(x.to(group.device)) for x in inputs])  # (images, classes)
        for file, x, row in zip(files, inputs, logits, strict=True):
            check_logits(net, x.to(group.device), row, str(file))
    best = logits.float().softmax(dim=1).topk(min(topk, len(names)), dim=1)
    return [
        [(names[index], share) for share, index in zip(shares, indices, strict=True)]
        for shares, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def answers(
    path: str | Path,
    images: Sequence[str | Path],
    *,
    config: Config | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    topk: int | None = None,
    folder: Path | None = None,
) -> Iterator[tuple[Path, list[str]]]:
    """Run a model on images, and yield each with the lines of its task, one after another.

    Args:
        path: A file or folder that `from_pretrained` takes.
        images: Image files.
        config: The model of a file that is not ours.
        settings: Settings that differ from those of the file.
        device: `cpu`, `cuda` or None for a GPU if there is one.
        topk: Guesses for each image, of a classifier.
        folder: Where pictures go, of a model that makes masks.

    Raises:
        ValueError: As `load_run`, `predict` and `fambav.tasks.Task.answer`.
    """
    files = file_paths("images", images)
    with processes(device) as group, torch.no_grad():
        run = load_run(path, settings, config=config)
        run.check_images()
        names = run.class_names or [str(number) for number in range(run.num_classes)]
        _, height, width = run.input_size
        net = run.net.to(group.device)
        called = run.task.inference(run.config, net, (height, width)).eval()
        for file in files:
            lines = run.task.answer(
                data.read_image(file),
                called,
                partial(run.outputs_of, called, what=str(file)),
                names,
                file=file,
                topk=topk,
                folder=folder,
            )
            yield file, lines


def _build(state: RunState, config: Config, *, there: int | None, classes: int | None) -> nn.Module:
    """Build the model with the weights of a file.

    Args:
        state: The file.
        config: What the model is.
        there: Classes that the file has, if it has a classifier.
        classes: Length of the output, with a new head if the file's differs; None for the file's.
    """
    output = task_of(config.data.data_set).output
    expected = config.flat()[output] if classes is None else None
    if there is None:
        raise CheckpointError(f"{state.path} has no head.weight, expected a classifier")
    if expected not in (None, there):
        raise CheckpointError(f"{output} is {expected}, expected {there} as {state.path} has")
    net = model(config, num_classes=classes or there)
    state.load_into(net, head="strict" if classes is None else "drop")
    if classes not in (None, there):
        warnings.warn(
            f"{output} is {classes} and {state.path} has {there}: the head is new, with weights"
            " drawn at random",
            stacklevel=4,
        )
    return net.eval()


def _described(
    net: nn.Module,
    state: RunState,
    config: Config,
    size: tuple[int, int],
    words: Mapping[str, Any],
) -> LoadedRun:
    """Note on the model what images it reads, and of what classes."""
    mean, std = state.statistics or (IMAGENET_MEAN, IMAGENET_STD)
    names, classes = state.class_names, int(cast(Any, net).num_classes)
    names = names if names and len(names) == classes else None
    own: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}  # a user's model may lack it
    own = {
        **own,
        **words,
        "input_size": task_of(config.data.data_set).input_shape(len(mean), size),
        "num_classes": classes,
        "mean": mean,
        "std": std,
        "label_names": names,
    }
    vars(net).update(pretrained_cfg=own, default_cfg=own)
    return LoadedRun(
        state=state,
        config=config,
        net=net,
        class_names=names,
        mean=mean,
        std=std,
        transform=batches.eval_transform(config, (mean, std), size),
    )
