"""Grids of experiments: settings x seeds, each trained once, and one table of all.

grid.yaml -> cells -> workers -> result.json of each cell -> results.csv, results.md
"""

from fambav.experiments.grid import Cell, Grid, Row, read
from fambav.experiments.summary import table
from fambav.experiments.sweep import refuse_failures, run

__all__ = ["Cell", "Grid", "Row", "read", "refuse_failures", "run", "table"]
