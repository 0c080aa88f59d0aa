"""What an image costs, by arithmetic on sizes alone: no weights, no forward pass.

    config or model -> parts -> a cost for each part in three conventions -> table, JSON, Markdown

reduction      what it costs to choose and to take away tokens
network        what the parts of a model or a configuration come to; the model tells its parts
report         all of it for one image
"""

from fambav.costs.network import configured, count
from fambav.costs.reduction import OVERHEADS, Overhead
from fambav.costs.report import Report, Row
from fambav.models.flops import CONVENTIONS, Cost

__all__ = [
    "CONVENTIONS",
    "OVERHEADS",
    "Cost",
    "Overhead",
    "Report",
    "Row",
    "configured",
    "count",
]
