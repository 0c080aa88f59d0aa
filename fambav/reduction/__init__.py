"""Token reduction: which tokens go (methods), and where and how many (schedule)."""

from fambav.ops.match import Selection, others
from fambav.reduction.apply import merge, unmerge
from fambav.reduction.grid_merging import Storm
from fambav.reduction.merging import FambaV, Ordered, RMeeTo, SequentialMerging, ToMe
from fambav.reduction.pruning import MTR, UTRC, EViT, PruneAligned, Random
from fambav.reduction.reducer import Reducer, known_options, make_reducer, read_options
from fambav.reduction.reduction import (
    Reducible,
    Reduction,
    fused,
    make_reduction,
    no_reduction,
    reduce,
)
from fambav.reduction.schedule import (
    Schedule,
    from_fusion,
    make_schedule,
    parse_schedule,
    plan,
    write_schedule,
)

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
    "Storm",
    "ToMe",
    "from_fusion",
    "fused",
    "known_options",
    "make_reducer",
    "make_reduction",
    "make_schedule",
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
