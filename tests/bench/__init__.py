"""Tests of fambav.bench."""


def find(report, **wanted):
    """The first row of a report with these values."""
    return next(row for row in report.rows if wanted.items() <= row.items())
