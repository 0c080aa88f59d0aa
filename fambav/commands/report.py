"""fambav report."""

from __future__ import annotations

from pathlib import Path

from fambav.commands.output import check_files, print_line
from fambav.commands.parser import Parser
from fambav.config import ConfigError

_ENDINGS = (".html", ".htm")


def run(words: list[str]) -> None:
    """Write one HTML page of finished runs and grids: tables, pictures, plans, settings."""
    parser = Parser("fambav report", description=run.__doc__, allow_abbrev=False)
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="RUN|GRID",
        help="folders of runs, each with its best checkpoint, and of grids",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page; report.html in the first folder"
    )
    parser.add_argument("--title", metavar="TEXT", help="of the page")
    parser.add_argument(
        "--image", type=Path, nargs="+", default=(), metavar="FILE", help="to draw tokens on"
    )
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="runs of several machines or recipes, without time and memory",
    )
    parser.add_argument(
        "--no-class-accuracy",
        action="store_true",
        help="without accuracy by class, which evaluates the weights on all held-out images",
    )
    given = parser.parse_args(words)
    target = given.output or given.folders[0] / "report.html"
    if target.suffix not in _ENDINGS:
        raise ConfigError(f"--output is {str(target)!r}, expected a file ending in .html")
    check_files(target if given.folders[0].is_dir() else given.output)
    from fambav import viz

    viz.write_report(
        given.folders,
        target,
        title=given.title,
        mixed=given.mixed,
        source=viz.Source(images=tuple(given.image)),
        by_class=not given.no_class_accuracy,
    )
    print_line(f"{target}  {target.stat().st_size / 2**20:.1f} MiB")
