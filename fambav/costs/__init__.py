"""What an image costs, by arithmetic on sizes alone: no weights, no forward pass.

    config or model -> parts -> a cost for each part in three conventions -> table, JSON, Markdown

conventions    what counts as one operation
parts          patch embedding, mixers and head of a model
vim            Vim's mixer
plainmamba     PlainMamba's mixer and stem
reduction      what it costs to choose and to take away tokens
network        which parts a model or a configuration has
report         all of it for one image
"""

from fambav.costs.conventions import CONVENTIONS, Cost
from fambav.costs.network import configured, count
from fambav.costs.reduction import OVERHEADS, Overhead
from fambav.costs.report import Report, Row

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
