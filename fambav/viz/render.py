"""From run folders to files: which figures a run gets, of which images.

run -> model and images -> figures -> PNG, SVG, GIF
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from PIL import Image

from fambav import data, experiments
from fambav.arguments import file_path, file_paths, near_path
from fambav.data import DataSet
from fambav.engine.finite import check_logits
from fambav.models import Backbone
from fambav.registry import PICTURES, family_of, nearest
from fambav.tasks.detection import on_image
from fambav.tasks.segmentation import predicted_mask
from fambav.training.inference import LoadedRun, load_run
from fambav.viz import figures, measures
from fambav.viz.compare import compare_strategies, described
from fambav.viz.logs import Record, curves
from fambav.viz.masks import boxes, masks
from fambav.viz.measures import Reduced
from fambav.viz.style import save
from fambav.viz.trace import TokenTrace, trace_stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOG = "log.txt"


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

    def several(self) -> bool:
        """Return whether there is more than one image."""
        return len(self.images or self.index) > 1

    def read(self, run: LoadedRun) -> Iterator[tuple[Image.Image, Any, str]]:
        """Yield images, the target of each or None, and what it is.

        Raises:
            ValueError: If there is none of that number, or it cannot be read.
        """
        if self.images:
            yield from ((data.read_image(path), None, path.name) for path in self.images)
            return
        data_set = held_out(run, self)
        for index in self.index:
            if not 0 <= index < len(data_set.val):
                last = len(data_set.val) - 1
                raise ValueError(
                    f"index is {index}, expected 0 to {last}, held-out images of {data_set.name}"
                )
            image, target = data_set.val[index]
            about = f"{data_set.name}, held-out image {index}"
            if isinstance(target, int):
                names = data_set.class_names
                about += f", labelled {names[target] if names else f'class {target}'}"
            yield image, target, about


# A model, an image in each of its stages, the model's name, what the image is.
Traced = tuple[Reduced, tuple[TokenTrace, ...], str, str]


class Picture(NamedTuple):
    """A file: what it shows, in one line, and where it is."""

    title: str
    path: Path


def held_out(run: LoadedRun, source: Source | None = None) -> DataSet:
    """Open the data set of a run, or the one that images are to come from.

    Raises:
        DataError: If the data is missing or damaged.
    """
    wanted, classes, source = run.config.data, run.config.model.num_classes, source or Source()
    return data.load(
        source.data_set or wanted.data_set,
        source.data_path or wanted.data_path,
        inat_category=wanted.inat_category,
        classes=1000 if classes is None else classes,
        image_size=cast(Any, run.net.pretrained_cfg)["input_size"][1:],
        seed=run.config.run.seed,
    )


def traced(
    path: Path, source: Source | None = None, settings: Mapping[str, Any] | None = None
) -> Iterator[Traced]:
    """Open a run or a file of weights, and send images through its model.

    Args:
        path: A run folder, a checkpoint, a `.safetensors` file or an exported folder.
        source: Where images come from; the first held-out one of the run's own data by default.
        settings: Settings by the names of main.py's flags that differ from those of the run; of a
            file that is not ours, such as its model.

    Yields:
        The model, what an image does in each of its stages, the model's name, and what the image
        is.

    Raises:
        ValueError: If the weights are missing or cannot be used, or an image is not there.
        NotFiniteError: If a logit is not finite.
    """
    yield from _traces(load_run(path, settings), source or Source())


def _traces(run: LoadedRun, source: Source) -> Iterator[Traced]:
    name, net = run.config.model.model, run.net
    if not isinstance(net, Reduced) or not family_of(name).reducible:
        raise ValueError(f"model is {name!r}, expected one whose tokens can be reduced")
    for image, _, about in source.read(run):
        traces = trace_stages(net, run.transform(image), statistics=(run.mean, run.std))
        first = traces[0]
        check_logits(net, first.image[None], torch.from_numpy(first.logits), about)
        seen = int(first.logits.argmax())
        truth = run.class_names[seen] if run.class_names else f"{seen}"
        yield net, traces, name, f"{about}, seen as {truth}"


def render(
    runs: Sequence[Path],
    folder: Path,
    *,
    what: Sequence[str] | None = None,
    source: Source | None = None,
    settings: Mapping[str, Any] | None = None,
    svg: bool = False,
    timed: bool = True,
) -> Iterator[tuple[str, Picture]]:
    """Draw figures of runs into a folder.

    Args:
        runs: Run folders, or files of weights.
        folder: Gets the files; made if need be.
        what: Names of `PICTURES`; all by default, without curves where a run has no log, and
            without those that there are not of a run's model and task.
        source: As in `traced`.
        settings: As in `traced`.
        svg: Write figures as SVG too.
        timed: As of `curves`.

    Yields:
        Name and picture, as soon as its file is written.  The name is one of `PICTURES`, after the
        run's name and a slash if there are several runs, and before a slash and the image's number
        if there are several.

    Raises:
        ValueError: If a name is unknown, a run has no weights, an image cannot be read, or
            matplotlib is not installed.
        OSError: If the folder cannot be written.
    """
    source, runs, folder = source or Source(), file_paths("runs", runs), file_path("folder", folder)
    wanted, names = _wanted(runs, what), names_of(runs)
    kinds = [kind for kind in wanted if kind != "curves"]
    logs = dict(zip(names, map(read_log, runs), strict=True)) if "curves" in wanted else {}
    for run, name in zip(runs, names, strict=True):
        if not kinds:
            continue
        opened = load_run(run, settings)
        own = kinds if what is not None else [k for k in kinds if k in _kinds_of(opened)]
        for number, kind, drawn, title in _drawn(opened, own, source):
            label = f"{name}/{kind}" if len(runs) > 1 else kind
            label += f"/{number}" if source.several() else ""
            yield label, _write(drawn, f"{PICTURES[kind]}: {title}", folder, label, svg=svg)
    if "curves" in wanted:
        title = f"training of {', '.join(names)}" if len(names) < 4 else f"{len(names)} runs"
        drawn = curves(logs, title=title, metric=experiments.read_primary(runs[0]), timed=timed)
        yield "curves", _write(drawn, title, folder, "curves", svg=svg)


def read_log(run: Path) -> list[Record]:
    """Return the records of a run's epochs.

    Raises:
        ValueError: If the folder has no log, or a line of it is damaged.
    """
    path = run / _LOG
    if not path.is_file():
        hint = near_path(run)
        raise ValueError(f"run is {str(run)!r}, expected a folder with {_LOG} to draw curves{hint}")
    return list[Record](experiments.read_log(path))


def names_of(runs: Sequence[Path]) -> list[str]:
    """Name each run by the shortest end of its path that is unique."""
    parts = [
        run.resolve().with_suffix("").parts if run.is_file() else run.resolve().parts
        for run in runs
    ]
    for many in range(1, max(map(len, parts))):
        names = ["-".join(part[-many:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"run is {str(runs[0])!r} more than once, expected every run once")


_KINDS: dict[str, Callable[..., Figure | list[Figure]]] = {
    "groups": figures.groups,
    "strategies": figures.strategies,
    "animation": figures.animation,
    "similarity": measures.similarity,
    "mean_similarity": measures.mean_similarity,
    "scan": measures.scan,
}


_DENSE: dict[str, tuple[Callable[..., Any], Callable[..., Figure]]] = {
    "masks": (predicted_mask, masks),
    "boxes": (on_image, boxes),
}


def _draw(
    kind: str, model: Reduced, traces: tuple[TokenTrace, ...], name: str, about: str
) -> tuple[Figure | list[Figure], str]:
    """Draw a kind of figure; return its title too."""
    title = f"{name}, {described(model.reduction)}"
    if kind == "layers":
        return measures.layers(model, title=title), title
    title = f"{title}: {about}"
    if kind == "strategies":
        method, _ = compare_strategies(cast(Backbone, model))
        title = f"{name} with each strategy of {method}: {about.rpartition(', seen as')[0]}"
    return _KINDS[kind](model, traces, title=title), title


def _kinds_of(run: LoadedRun) -> tuple[str, ...]:
    """Return what there is to draw of a run's model."""
    family = family_of(run.config.model.model)
    if not isinstance(run.net, Reduced) or not family.reducible or not run.task.classes:
        return tuple(run.task.pictures)
    left_out = {"strategies": family.staged, "scan": not family.scan}
    tokens = [kind for kind in (*_KINDS, "layers") if not left_out.get(kind)]
    return (*tokens, *run.task.pictures)


def _drawn(
    run: LoadedRun, kinds: Sequence[str], source: Source
) -> Iterator[tuple[int, str, Figure | list[Figure], str]]:
    """Yield figures of each image: its number, the kind, the figure and its title."""
    for kind in (kind for kind in kinds if kind in _DENSE):
        for number, (drawn, title) in enumerate(_predictions(run, kind, source)):
            yield number, kind, drawn, title
    tokens = [kind for kind in kinds if kind not in _DENSE]
    for number, traces in enumerate(_traces(run, source) if tokens else ()):
        for kind in tokens:
            yield number, kind, *_draw(kind, *traces)


@torch.no_grad()
def _predictions(run: LoadedRun, kind: str, source: Source) -> Iterator[tuple[Figure, str]]:
    """Draw images with the masks or boxes that a model gives them.

    Raises:
        ValueError: If its task has none.
    """
    name, (_, height, width) = run.config.model.model, run.input_size
    if kind not in run.task.pictures:
        raise ValueError(f"model is {name!r}, expected one whose outputs are {kind}")
    net = run.task.inference(run.config, run.net, (height, width)).eval()
    names = run.class_names or [f"class {number}" for number in range(run.num_classes)]
    for image, truth, about in source.read(run):
        predict, draw = _DENSE[kind]
        seen = predict(image, net, partial(run.outputs_of, net, what=about))
        yield draw(image, truth, seen, names, title=f"{name}: {about}"), f"{name}: {about}"


def _wanted(runs: Sequence[Path], what: Sequence[str] | None) -> list[str]:
    """Return the kinds that are named, or all that there can be."""
    if what is None:
        logged = all((run / _LOG).is_file() for run in runs)
        return [name for name in PICTURES if logged or name != "curves"]
    for name in what:
        if name not in PICTURES:
            raise ValueError(
                f"what is {name!r}, expected names of pictures; {nearest(name, PICTURES)}"
            )
    return list(dict.fromkeys(what))


def _write(
    drawn: Figure | list[Figure], title: str, folder: Path, label: str, *, svg: bool
) -> Picture:
    ending = ".gif" if isinstance(drawn, list) else ".png"
    folder.mkdir(parents=True, exist_ok=True)  # not before there is something to write
    path = folder / f"{label.replace('/', '_')}{ending}"
    save(drawn, path)
    if svg and not isinstance(drawn, list):
        save(drawn, path.with_suffix(".svg"))
    return Picture(title, path)
