"""Grids of experiments: settings x seeds, each trained once, and one table of all.

grid.yaml -> cells -> workers -> result.json of each cell -> results.csv, results.json, results.md

grid_file   what a YAML file asks for
rows        its rows
grid        the cells that have to run
sweep       carries them out, what is finished apart
workers     the processes, and the GPU of each
results     one cell, and what it leaves in its folder
figures     means over seeds
summary     the table for people
archive     the tables for programs
points      what a folder holds, read back
"""

from fambav.experiments.figures import Estimate
from fambav.experiments.grid import Cell, Grid
from fambav.experiments.grid_file import read
from fambav.experiments.points import Point, is_grid, points
from fambav.experiments.rows import Paper, Row
from fambav.experiments.summary import rendered, table
from fambav.experiments.sweep import refuse_failures, run
from fambav.experiments.workers import gpus

__all__ = [
    "Cell",
    "Estimate",
    "Grid",
    "Paper",
    "Point",
    "Row",
    "gpus",
    "is_grid",
    "points",
    "read",
    "refuse_failures",
    "rendered",
    "run",
    "table",
]
