"""From the folders of runs and grids to one page."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fambav import experiments, gallery, pictures
from fambav.engine.checkpoint import write_text
from fambav.engine.record import environment
from fambav.experiments import METRICS, PRIMARY, Estimate, Point
from fambav.report import contents
from fambav.report.page import Page, Picture, Section, drawn, picture
from fambav.table import Table

_CURVES = "curves"
_COLUMNS = {  # of a grid: what it is called, and its digits
    **{metric.name: (metric.head, 2) for metric in METRICS},
    "token_layers": ("token-layers", 3),
    "seconds": ("train s", 1),
    "memory_mib": ("memory MiB", 2),
}


def report(
    folders: Sequence[Path],
    target: Path,
    *,
    title: str | None = None,
    mixed: bool = False,
    source: gallery.Source | None = None,
) -> None:
    """Write a page of runs and grids, one file that needs no other and no network.

    Args:
        folders: Of finished runs and of grids.
        target: The file.
        title: Of the page; names of the folders by default.
        mixed: Whether the runs are of several machines or recipes: then their table has no time,
            memory and differences.
        source: Images to draw; the first held-out one of each run's data by default.

    Raises:
        ValueError: If a folder is neither a run nor a grid, something in it is damaged, runs are
            mixed without `mixed`, or matplotlib or Jinja2 is missing.
        OSError: If the file cannot be written.
    """
    grids = [folder for folder in folders if experiments.is_grid(folder)]
    runs = [folder for folder in folders if folder not in grids]
    results = [experiments.read_run(folder) for folder in runs]
    tables = [experiments.compare(results, mixed=mixed)] if results else []
    points = {folder: experiments.read_points(folder) for folder in grids}
    tables += [_tabulated(folder, found) for folder, found in points.items()]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        together = [_front(place, folder, found) for folder, found in points.items()]
        names = gallery.names_of(runs) if runs else []
        found = gallery.every(runs, place, source=source or gallery.Source()) if runs else {}
        shown = {name: picture(entry.path, entry.title) for name, entry in found.items()}
        together += [shown.pop(_CURVES)] if _CURVES in shown and len(runs) > 1 else []
        sections = [
            contents.section(name, folder, result, _own(name, shown, alone=len(runs) == 1))
            for name, folder, result in zip(names, runs, results, strict=True)
        ]
        write_text(target, drawn(_page(title, folders, tables, together, sections)))


def _page(
    title: str | None,
    folders: Sequence[Path],
    tables: Sequence[Table],
    together: Sequence[Picture],
    sections: Sequence[Section],
) -> Page:
    about = environment()
    when = time.strftime("%Y-%m-%d %H:%M")
    commit = "" if about["commit"] is None else f", commit {about['commit']}"
    return Page(
        title=title or f"fambav: {', '.join(folder.resolve().name for folder in folders)}",
        made=f"Made on {when} by fambav {about['fambav']}{commit}.",
        tables=tables,
        pictures=together,
        sections=sections,
    )


def _own(run: str, shown: dict[str, Picture], *, alone: bool) -> list[Picture]:
    """The pictures of one run among those of all."""
    if alone:
        return list(shown.values())
    return [found for name, found in shown.items() if name.startswith(f"{run}/")]


def _front(place: Path, folder: Path, points: Sequence[Point]) -> Picture:
    """Draw accuracy against cost over the rows of a grid."""
    title = f"{folder.resolve().name}: {PRIMARY.title} against cost"
    path = place / f"pareto_{folder.resolve().name}.png"
    pictures.write(pictures.pareto(points, metric=PRIMARY, title=title), path)
    return picture(path, title)


def _tabulated(folder: Path, points: Sequence[Point]) -> Table:
    columns = {k: v for k, v in _COLUMNS.items() if any(k in p.figures for p in points)}
    return Table(
        title=folder.resolve().name,
        head=("row", *(name for name, _ in columns.values())),
        rows=[
            [
                point.name,
                *(_text(point.figures.get(key), digits) for key, (_, digits) in columns.items()),
            ]
            for point in points
        ],
        names=1,
        notes=["mean ± sample standard deviation over seeds"],
    )


def _text(found: Estimate | None, digits: int) -> str:
    if found is None:
        return "-"
    spread = "" if found.std is None else f" ± {found.std:.{digits}f}"
    return f"{found.mean:.{digits}f}{spread}"
