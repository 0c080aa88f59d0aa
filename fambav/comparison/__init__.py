"""Runs side by side: what they came to, whether they may be compared, and how a table is drawn.

runs       the files of a finished run, and the table of several
likeness   the machine and the recipe of a run, and where two of them differ
tables     a table as text, Markdown and LaTeX
"""

from fambav.comparison.runs import Result, epochs_of, read, refuse_mixed, table, tabulated
from fambav.comparison.tables import FORMATS, Table

__all__ = ["FORMATS", "Result", "Table", "epochs_of", "read", "refuse_mixed", "table", "tabulated"]
