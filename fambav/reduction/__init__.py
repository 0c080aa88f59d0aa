"""Token reduction: which tokens go (methods), and where and how many (schedule)."""

from fambav.ops.match import Selection, others
from fambav.reduction.apply import merge, unmerge
from fambav.reduction.factory import (
    Reducible,
    fused,
    make_any_reduction,
    make_reduction,
    make_staged_reduction,
    no_reduction,
    reduce,
)
from fambav.reduction.grid_merging import Storm
from fambav.reduction.lengths import Schedule, StagedSchedule
from fambav.reduction.merging import FambaV, Ordered, RMeeTo, SequentialMerging, ToMe
from fambav.reduction.pruning import MTR, UTRC, EViT, PruneAligned, Random
from fambav.reduction.reducer import Reducer, known_options, make_reducer, read_options
from fambav.reduction.reduction import Reduction
from fambav.reduction.schedule import (
    from_fusion,
    make_schedule,
    parse_schedule,
    plan,
    write_schedule,
)
from fambav.reduction.stages import StagedReduction

__all__ = [
    "MTR",
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
    "StagedReduction",
    "StagedSchedule",
    "Storm",
    "ToMe",
    "from_fusion",
    "fused",
    "known_options",
    "make_any_reduction",
    "make_reducer",
    "make_reduction",
    "make_schedule",
    "make_staged_reduction",
    "merge",
    "no_reduction",
    "others",
    "parse_schedule",
    "plan",
    "read_options",
    "reduce",
    "unmerge",
    "write_schedule",
]
