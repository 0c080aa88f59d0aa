"""fambav table."""

from __future__ import annotations

import argparse
from pathlib import Path

from fambav.commands.parser import Parser
from fambav.config import ConfigError


def run(words: list[str]) -> None:
    """Compare finished runs, differences to the first; or run a grid of settings and seeds."""
    parser = Parser("fambav table", description=run.__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    _grid_flags(parser.add_argument_group("a grid of settings and seeds instead of runs"))
    given = parser.parse_args(words)
    if given.grid is not None:
        _table_of_grid(given)
        return
    if not given.runs:
        raise ConfigError("the following arguments are required: RUN, or --grid FILE.yaml")
    if given.output_dir or given.jobs or given.keep:
        raise ConfigError("--output_dir, --jobs and --keep have no meaning without --grid")
    from fambav import comparison

    rows = [comparison.read(folder) for folder in given.runs]
    print(comparison.table(rows, markdown=given.markdown))


def _grid_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--grid", type=Path, metavar="FILE.yaml", help="what to run and compare")
    group.add_argument(
        "--output_dir", "--output-dir", type=Path, metavar="DIR", help="gets the runs and the table"
    )
    group.add_argument("--jobs", type=int, metavar="N", help="processes that train at once (1)")
    group.add_argument("--keep", action="store_true", help="keep every run's checkpoints")


def _table_of_grid(given: argparse.Namespace) -> None:
    """Run what is missing of a grid, and print its table; what is finished is not run again."""
    if given.runs or given.output_dir is None:
        raise ConfigError("--grid stands without runs, expected --grid FILE.yaml --output_dir DIR")
    jobs = 1 if given.jobs is None else given.jobs
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}, expected at least 1")
    from fambav import experiments

    def say(line: str) -> None:
        print(line, flush=True)

    grid, folder = experiments.read(given.grid), given.output_dir
    found = experiments.run(grid, folder, jobs=jobs, keep=given.keep, say=say)
    print(experiments.table(grid, found, markdown=given.markdown))
    experiments.refuse_failures(grid, found, folder)
