"""One HTML page of finished runs and grids: tables, pictures, plans, settings and machines.

page       the page and its pieces, and how they become one file
contents   what the files of a run say
report     from folders to the file
"""

from fambav.report.report import report

__all__ = ["report"]
