"""Kernels compiled ahead of time: what they cost, without a GPU."""

from fambav.ahead.report import AheadError, Report, Row, compare, objections, read
from fambav.ahead.survey import survey

__all__ = ["AheadError", "Report", "Row", "compare", "objections", "read", "survey"]
