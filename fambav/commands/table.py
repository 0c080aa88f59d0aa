"""fambav table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fambav import registry
from fambav.arguments import check_folder
from fambav.commands.output import print_line
from fambav.commands.parser import Parser, number
from fambav.config import ConfigError, read_flags
from fambav.config.setting import PROCESSES, Bounds
from fambav.table import FORMATS

_LOG, _RESULTS = "log.txt", "results.json"  # what makes a folder a run's, and a grid's
_ENDINGS = (".yaml", ".yml")


def run(words: list[str]) -> None:
    """Train a grid of settings and seeds and print its table; or compare finished runs."""
    parser = Parser("fambav table", description=run.__doc__, allow_abbrev=False)
    parser.add_argument(
        "what", nargs="*", metavar="RUN|GRID", help="run folders, or a grid's name or YAML file"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="how to print it (text)")
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="show runs of several machines or recipes, without time and memory",
    )
    parser.add_argument(
        "--reach",
        type=number(float, Bounds()),
        nargs="+",
        default=(),
        metavar="VALUE",
        help="of runs: seconds of training until the main metric, such as accuracy, reaches it",
    )
    _grid_flags(parser.add_argument_group("with a grid; `fambav list grids` names those at hand"))
    given = parser.parse_args(words)
    grid = _grid(given)
    if grid is not None:
        if given.reach:
            raise ConfigError("--reach has no meaning with a grid")
        _table_of_grid(given, grid)
        return
    if not given.what:
        raise ConfigError("the following arguments are required: RUN... or GRID")
    for name in ("output_dir", "jobs", "seeds", "data_path", "epochs", "set", "keep", "dry_run"):
        if getattr(given, name) not in (None, False):
            raise ConfigError(f"--{name} has no meaning without a grid")
    if given.reach and given.mixed:
        raise ConfigError("--reach has no meaning with --mixed, which leaves out time")
    from fambav import experiments

    runs = [experiments.read_run(Path(folder)) for folder in given.what]
    print(experiments.compare(runs, mixed=given.mixed, reach=given.reach).render(given.format))


def _grid_flags(group: argparse._ArgumentGroup) -> None:
    seeds, jobs = number(int, Bounds(1, 10_000)), number(int, PROCESSES._replace(low=1))
    group.add_argument("--grid", type=Path, metavar="FILE.yaml", help="the same as GRID")
    group.add_argument("--seeds", type=seeds, metavar="N", help="seeds 0 to N - 1 (the grid's own)")
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="gets the runs and the table (output/NAME)",
    )
    group.add_argument("--data-path", metavar="DIR", help="folder of the data set (the settings')")
    group.add_argument("--epochs", metavar="N", help="epochs of every run (the settings')")
    group.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="a setting of main.py for every run, such as lr=1e-3 or no_model_ema; may be repeated;"
        " what a row or the fine-tuning sets by itself stays",
    )
    group.add_argument(
        "--jobs", type=jobs, metavar="N", help="processes that train at once (one per GPU, else 1)"
    )
    group.add_argument("--keep", action="store_true", help="keep every run's checkpoints")
    group.add_argument(
        "--dry-run", action="store_true", help="print the rows and what they cost; train nothing"
    )


def _grid(given: argparse.Namespace) -> Path | None:
    """The file of the grid to carry out; None if runs are to be compared."""
    if given.grid is not None:
        if given.what:
            raise ConfigError("--grid stands without runs, expected --grid FILE.yaml alone")
        return registry.shipped(given.grid)
    if len(given.what) != 1 or (Path(given.what[0]) / _LOG).is_file():
        return None
    name, known = given.what[0], registry.grids()
    if (Path(name) / _RESULTS).is_file():
        hint = f"fambav table GRID --output_dir {name}"
        raise ConfigError(f"{name!r} is the folder of a grid, expected runs, or the grid; {hint}")
    if Path(name).suffix in _ENDINGS:
        return registry.shipped(name)
    if name in known:
        return known[name]
    if Path(name).is_dir() or Path(name).name != name:
        return None
    hint = registry.nearest(name, known)
    raise ConfigError(f"{name!r} is no run folder, expected one, or a grid; {hint}")


def _table_of_grid(given: argparse.Namespace, path: Path) -> None:
    """Run what is missing of a grid, and print its table; what is finished is not run again."""
    folder = Path("output", path.stem) if given.output_dir is None else given.output_dir
    check_folder(folder)
    from fambav import experiments
    from fambav.experiments import process, sweep

    # The table stands alone there.
    stream = sys.stdout if given.format == FORMATS[0] else sys.stderr

    def report(line: str) -> None:
        print_line(line, stream)

    grid = experiments.read_grid(path, seeds=given.seeds, settings=_settings(given))
    jobs = given.jobs or max(1, len(process.gpus()))
    if given.dry_run:
        print(sweep.cost(grid, folder, jobs=jobs).render(given.format))
        return
    results = sweep.run(grid, folder, jobs=jobs, keep=given.keep, report=report, mixed=given.mixed)
    print(experiments.table(results, mixed=given.mixed).render(given.format))
    sweep.refuse_failures(results, folder)


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """The settings for every run of a grid."""
    flags = [f"--{setting}" for setting in given.set or ()]
    flags += [
        f"--{name}={getattr(given, name)}"
        for name in ("data_path", "epochs")
        if getattr(given, name) is not None
    ]
    return read_flags(flags)
