"""Runs side by side, and grids of experiments: settings x seeds, each trained once, and one table.

grid.yaml -> cells -> a process and result.json of each -> results.csv, results.json, results.md

metrics     the metrics of tables, and whether higher is better
provenance  the machine and the config fingerprint of a run, and where two of them differ
runs        the files of a finished run, and the table of several
grid_file   the YAML file of a grid
rows        its rows
grid        the cells that have to run
sweep       carries them out, what is finished apart
process     a cell in a process of its own, and the files in its folder
cell        what that process does
results     means over seeds, the tables for programs, and their reader
summary     the table for people

What is offered here loads no torch; `fambav.experiments.sweep` does.
"""

from fambav.experiments.grid_file import read_grid
from fambav.experiments.metrics import PRIMARY
from fambav.experiments.results import (
    Estimate,
    Point,
    Results,
    is_grid,
    read_points,
    read_task,
    read_title,
)
from fambav.experiments.runs import (
    Result,
    changed_settings,
    compare,
    log_metrics,
    read_environment,
    read_log,
    read_plan,
    read_primary,
    read_run,
)
from fambav.experiments.summary import table

__all__ = [
    "PRIMARY",
    "Estimate",
    "Point",
    "Result",
    "Results",
    "changed_settings",
    "compare",
    "is_grid",
    "log_metrics",
    "read_environment",
    "read_grid",
    "read_log",
    "read_plan",
    "read_points",
    "read_primary",
    "read_run",
    "read_task",
    "read_title",
    "table",
]
