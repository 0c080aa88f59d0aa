"""Every picture of one run or several, as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fambav import costs, experiments, pictures
from fambav.costs import CONVENTIONS
from fambav.gallery.contrast import contrasted, described, reducing
from fambav.gallery.subject import FIRST, Source, Subject, subjects
from fambav.models import Backbone
from fambav.pictures import Walk, Work
from fambav.pictures.curves import Record
from fambav.reduction import no_reduction
from fambav.registry import PICTURES, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = tuple["Figure", str]

_LOG = "log.txt"
_COUNTED = "all-directions"


class Picture(NamedTuple):
    """A file.

    Attributes:
        title: What it shows, in one line.
        path: Where it is.
    """

    title: str
    path: Path


def every(
    runs: Sequence[Path],
    folder: Path,
    *,
    what: Sequence[str] | None = None,
    source: Source = FIRST,
    settings: Mapping[str, Any] | None = None,
    svg: bool = False,
) -> dict[str, Picture]:
    """Draw pictures of runs into a folder, as `drawn` does one after the other.

    Returns:
        The pictures by name.  The name is one of `PICTURES`, after the run's name and a slash if
        there are several runs, and before a slash and the image's number if there are several.
    """
    return dict(drawn(runs, folder, what=what, source=source, settings=settings, svg=svg))


def drawn(
    runs: Sequence[Path],
    folder: Path,
    *,
    what: Sequence[str] | None = None,
    source: Source = FIRST,
    settings: Mapping[str, Any] | None = None,
    svg: bool = False,
) -> Iterator[tuple[str, Picture]]:
    """Draw pictures of runs into a folder.

    Args:
        runs: Run folders, or files of weights.
        folder: Gets the files; made if need be.
        what: Names of `PICTURES`; all by default, without curves where a run has no log.
        source: Where images come from.
        settings: As in `subjects`.
        svg: Write pictures as SVG too.

    Yields:
        Name and picture, as soon as its file is written.

    Raises:
        ValueError: If a name is unknown, a run has no weights, an image cannot be read, or
            matplotlib is not installed.
        OSError: If the folder cannot be written.
    """
    wanted = _wanted(runs, what)
    alone = [name for name in wanted if name != "curves"]
    names = names_of(runs)
    for run, own in zip(runs, names, strict=True):
        before = f"{own}/" if len(runs) > 1 else ""
        each = subjects(run, source, settings) if alone else iter(())
        many = max(len(source.images), len(source.index) if not source.images else 0) > 1
        for number, subject in enumerate(each):
            folder.mkdir(parents=True, exist_ok=True)  # not before the weights are read
            for name in alone:
                label = f"{before}{name}{f'/{number}' if many else ''}"
                path = folder / label.replace("/", "_")
                yield label, _alone(name, subject, path, svg=svg)
    if "curves" in wanted:
        logs = {name: read_log(run) for name, run in zip(names, runs, strict=True)}
        title = f"training of {', '.join(names)}" if len(names) < 4 else f"{len(names)} runs"
        folder.mkdir(parents=True, exist_ok=True)
        yield (
            "curves",
            _write(pictures.curves(logs, title=title), title, folder / "curves", svg=svg),
        )


def read_log(run: Path) -> list[Record]:
    """Return the records of a run's epochs.

    Raises:
        ValueError: If the folder has no log, or a line of it is damaged.
    """
    path = run / _LOG
    if not path.is_file():
        raise ValueError(f"run is {str(run)!r}, expected a folder with {_LOG} to draw curves")
    return list[Record](experiments.read_log(path))


def _alone(name: str, subject: Subject, path: Path, *, svg: bool) -> Picture:
    """Draw a picture of one model and image."""
    if name == "animation":
        title = f"{PICTURES[name]}: {subject.title}"
        path = path.with_name(f"{path.name}.gif")
        frames = pictures.frames(subject.pixels, subject.walk, title=subject.title)
        pictures.animate(frames, path)
        return Picture(title, path)
    figure, title = _DRAWN[name](subject)
    return _write(figure, f"{PICTURES[name]}: {title}", path, svg=svg)


def _write(figure: Figure, title: str, path: Path, *, svg: bool) -> Picture:
    written = path.with_name(f"{path.name}.png")
    pictures.write(figure, written)
    if svg:
        pictures.write(figure, path.with_name(f"{path.name}.svg"))
    return Picture(title, written)


def _groups(subject: Subject) -> Drawn:
    title = subject.title
    return pictures.over_depth(subject.pixels, subject.walk, title=title), title


def _strategies(subject: Subject) -> Drawn:
    method, reductions = contrasted(subject.model)
    walks = {}
    for name, reduction in reductions.items():
        with reducing(subject.model, reduction):
            walks[name] = pictures.follow(subject.model, subject.image)
    own = subject.model.reduction.name
    unable = "" if own in (method, "none") else f" ({own} cannot do them all)"
    title = f"{subject.name} with each strategy of {method}{unable}: {subject.about}"
    return pictures.strategies(subject.pixels, walks, title=title), title


def _similarity(subject: Subject) -> Drawn:
    return pictures.maps(subject.walk, title=subject.title), subject.title


def _likeness(subject: Subject) -> Drawn:
    found = {described(subject.model.reduction): pictures.likeness(subject.walk)}
    if subject.model.schedule.removed:
        found["no reduction, same weights"] = pictures.likeness(_dense(subject))
    return pictures.likeness_curves(found, title=subject.title), subject.title


def _dense(subject: Subject) -> Walk:
    with reducing(subject.model, no_reduction(subject.model.info)):
        return pictures.follow(subject.model, subject.image)


def _layers(subject: Subject) -> Drawn:
    model = subject.model
    title = f"{subject.name}, {described(model.reduction)}"
    plan = model.schedule
    return pictures.bars(plan.lengths, plan.start, work(model), title=title), title


def work(model: Backbone) -> Work:
    """Count the operations of each layer, with those of every direction of a scan.

    Raises:
        ValueError: If nothing is known of what the model, or its method of reduction, costs.
    """
    layers = [row for row in costs.count(model).rows if row.layer is not None]
    with reducing(model, no_reduction(model.info)):
        dense = [row for row in costs.count(model).rows if row.layer is not None]
    return Work(
        own=[row.own.all_directions for row in layers],
        added=[row.alignment.all_directions + row.reduction.all_directions for row in layers],
        dense=[row.own.all_directions for row in dense],
        counted=CONVENTIONS[_COUNTED],
    )


def _scan(subject: Subject) -> Drawn:
    return pictures.paths(subject.pixels, subject.walk, title=subject.title), subject.title


_DRAWN: dict[str, Callable[[Subject], Drawn]] = {
    "groups": _groups,
    "strategies": _strategies,
    "similarity": _similarity,
    "likeness": _likeness,
    "layers": _layers,
    "scan": _scan,
}


def _wanted(runs: Sequence[Path], what: Sequence[str] | None) -> list[str]:
    """Return the pictures asked for, or all that there can be."""
    if what is None:
        logged = all((run / _LOG).is_file() for run in runs)
        return [name for name in PICTURES if logged or name != "curves"]
    for name in what:
        if name not in PICTURES:
            raise ValueError(
                f"what is {name!r}, expected names of pictures; {nearest(name, PICTURES)}"
            )
    return list(dict.fromkeys(what))


def names_of(runs: Sequence[Path]) -> list[str]:
    """Call each run by as many last parts of its path as tell it from the others."""
    parts = [
        run.resolve().with_suffix("").parts if run.is_file() else run.resolve().parts
        for run in runs
    ]
    for many in range(1, max(map(len, parts))):
        names = ["-".join(part[-many:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"run is {str(runs[0])!r} more than once, expected every run once")
