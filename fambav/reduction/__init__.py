"""Fewer tokens: which (methods), where and how many (schedule), and what the scan makes of it."""

from fambav.ops.match import Selection, others
from fambav.reduction.apply import merge, unmerge
from fambav.reduction.merging import FambaV, Ordered, ToMe
from fambav.reduction.mtr import MTR
from fambav.reduction.pruning import EViT, PruneAligned, Random
from fambav.reduction.r_meeto import RMeeTo
from fambav.reduction.reducer import Reducer, known_options, make_reducer, read_options
from fambav.reduction.reduction import (
    OUTPUT,
    Reducible,
    Reduction,
    fused,
    make_reduction,
    no_reduction,
    reduce,
)
from fambav.reduction.schedule import Schedule, fusion, parse_plan, plan
from fambav.reduction.sequential import SequentialMerging
from fambav.reduction.storm import Storm
from fambav.reduction.utrc import UTRC

__all__ = [
    "MTR",
    "OUTPUT",
    "UTRC",
    "EViT",
    "FambaV",
    "Ordered",
    "PruneAligned",
    "RMeeTo",
    "Random",
    "Reducer",
    "Reducible",
    "Reduction",
    "Schedule",
    "Selection",
    "SequentialMerging",
    "Storm",
    "ToMe",
    "fused",
    "fusion",
    "known_options",
    "make_reducer",
    "make_reduction",
    "merge",
    "no_reduction",
    "others",
    "parse_plan",
    "plan",
    "read_options",
    "reduce",
    "unmerge",
]
