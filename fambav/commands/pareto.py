"""fambav pareto."""

from __future__ import annotations

import argparse
from pathlib import Path

from fambav.arguments import check_folder
from fambav.commands.output import print_line
from fambav.commands.parser import Parser


def run(words: list[str]) -> None:
    """Draw accuracy against time, memory, operations and tokens over the rows of a grid."""
    given = _parser().parse_args(words)
    folder = given.output_dir or given.folder
    check_folder(folder)
    from fambav import experiments, viz

    points = experiments.read_points(given.folder, phase=given.phase)
    title, kinds = experiments.read_title(given.folder)
    metric = experiments.read_task(given.folder).primary
    if points:
        title = f"{title}: {metric.title} against cost, {points[0].phase}"
    detail = f"memory: {kinds}" if kinds else ""
    figure = viz.pareto(points, title=title, detail=detail, metric=metric)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        path = folder / f"pareto.{kind}"
        viz.save(figure, path)
        print_line(f"{path}  {title}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("fambav pareto", description=run.__doc__, allow_abbrev=False)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the folder of a grid, see fambav table --grid"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where pareto.png and pareto.svg go; FOLDER by default",
    )
    parser.add_argument("--phase", metavar="NAME", help="such as training-free or fine-tuned")
    return parser
