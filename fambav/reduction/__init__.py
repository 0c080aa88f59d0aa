"""Fewer tokens: where and how many (schedule), what happens to them (reducer), which (merge)."""

from fambav.ops.match import Selection, others
from fambav.reduction.merge import FambaV, Ordered
from fambav.reduction.reducer import Reducer, make_reducer, merge
from fambav.reduction.schedule import Schedule, parse_plan, plan, schedule

__all__ = [
    "FambaV",
    "Ordered",
    "Reducer",
    "Schedule",
    "Selection",
    "make_reducer",
    "merge",
    "others",
    "parse_plan",
    "plan",
    "schedule",
]
