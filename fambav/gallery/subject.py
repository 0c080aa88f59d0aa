"""What is pictured: a model with its weights, and an image as the model sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fambav import data
from fambav.build import batches, entries, from_pretrained, saved
from fambav.build.network import sketch
from fambav.config import Config
from fambav.data.arrays import IMAGENET_MEAN, IMAGENET_STD
from fambav.engine.checkpoint import State
from fambav.engine.finite import check_logits
from fambav.engine.record import BEST, CHECKPOINT, WEIGHTS
from fambav.gallery.contrast import described
from fambav.models import Backbone
from fambav.pictures.groups import Pixels
from fambav.pictures.walk import Walk, follow


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        images: Files; if there are any, the rest does not matter.
        data_set: Name of a data set; None for the run's own.
        data_path: Folder of the data; None for the run's own.
        index: Which of its held-out images, from 0.
    """

    images: tuple[Path, ...] = ()
    data_set: str | None = None
    data_path: Path | None = None
    index: tuple[int, ...] = (0,)


FIRST = Source()


@dataclass(frozen=True)
class Subject:
    """A model and an image.

    Attributes:
        name: What the model is called.
        model: It, in evaluation mode.
        image: As the model takes it, (in_chans, height, width).
        pixels: The same to look at, from 0 to 1, (height, width, 3).
        about: What the image is.
        classes: Names of the model's classes.
    """

    name: str
    model: Backbone
    image: Tensor
    pixels: Pixels
    about: str
    classes: tuple[str, ...]

    @cached_property
    def walk(self) -> Walk:
        """The image's way through the model.

        Raises:
            NotFiniteError: If a logit is not finite.
        """
        walk = follow(self.model, self.image)
        check_logits(self.model, self.image[None], torch.from_numpy(walk.logits), self.about)
        return walk

    @property
    def what(self) -> str:
        """The image, and what the model takes it for."""
        return f"{self.about}, seen as {self.classes[int(self.walk.logits.argmax())]}"

    @property
    def title(self) -> str:
        """Model, method and image."""
        return f"{self.name}, {described(self.model.reduction)}: {self.what}"


def subjects(
    run: Path, source: Source = FIRST, settings: Mapping[str, Any] | None = None
) -> Iterator[Subject]:
    """Open a run or a file of weights, and images to look at.

    Args:
        run: A run folder, a checkpoint or a `.safetensors` file.
        source: Where images come from; the first held-out one of the run's own data by default.
        settings: Settings by the names of main.py's flags that differ from those of the run; of a
            file that is not ours, what it is of.

    Yields:
        The same model with one image after another.

    Raises:
        ValueError: If the run has no weights, they cannot be used, or an image is not there.
    """
    path = weights(run)
    state = entries.load(path)
    config = _config(path, state, dict(settings or {}))
    model = from_pretrained(path, **dict(settings or {}))
    if not isinstance(model, Backbone):
        raise ValueError(
            f"model is {config.model.model!r}, expected one whose tokens can be reduced"
        )
    statistics = tuple(
        entries.fact(state, name) or default
        for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
    )
    size = sketch(config).input_size
    transform = batches.eval_transform(config, statistics, size)
    told: Any = model.pretrained_cfg
    names = told["label_names"] or [str(n) for n in range(model.num_classes)]
    for picture, about in _images(source, config, size):
        image = transform(picture)
        yield Subject(
            name=config.model.model,
            model=model,
            image=image,
            pixels=_seen(image, statistics),
            about=about,
            classes=tuple(names),
        )


def weights(run: Path) -> Path:
    """Return the file of a run's weights, the best ones if they were kept.

    Raises:
        ValueError: If there is none.
    """
    if run.is_file():
        return run
    names = (BEST, CHECKPOINT, WEIGHTS)
    found = next((run / name for name in names if (run / name).is_file()), None)
    if found is None:
        raise ValueError(
            f"run is {str(run)!r}, expected a file of weights or a folder with {BEST}, {CHECKPOINT}"
            f" or {WEIGHTS}"
        )
    return found


def _config(path: Path, state: State, settings: dict[str, Any]) -> Config:
    """Return the settings of a file, changed by others."""
    made_with = saved.settings(state)
    if made_with is not None:
        return made_with.replace(**settings) if settings else made_with
    if "model" not in settings:
        raise ValueError(
            f"{path} does not say what it is of, expected a file of ours; name its model with"
            " --model"
        )
    return Config.from_flat(settings)


def _images(
    source: Source, config: Config, size: tuple[int, int]
) -> Iterator[tuple[Image.Image, str]]:
    """Read images, and say what each is."""
    if source.images:
        for path in source.images:
            yield data.read_image(path), path.name
        return
    wanted, classes = config.data, config.model.num_classes
    name = source.data_set or wanted.data_set
    found = data.load(
        name,
        source.data_path or wanted.data_path,
        inat_category=wanted.inat_category,
        classes=1000 if classes is None else classes,
        image_size=size,
        seed=config.run.seed,
    )
    for index in source.index:
        if not 0 <= index < len(found.val):
            last = len(found.val) - 1
            raise ValueError(f"index is {index}, expected 0 to {last}, held-out images of {name}")
        image, label = found.val[index]
        truth = found.class_names[label] if found.class_names else f"class {label}"
        yield image, f"{name}, held-out image {index}, labelled {truth}"


def _seen(image: Tensor, statistics: Any) -> Pixels:
    """Undo the normalisation of an image, (3, height, width)."""
    mean, std = (torch.tensor(each)[:, None, None] for each in statistics)
    pixels: Pixels = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy().astype(np.float64)
    return pixels
