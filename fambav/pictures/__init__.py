"""Pictures of token reduction: functions of arrays that return a figure, and write nothing.

image, model -> follow -> Walk -> a figure -> write

walk         what happens to an image on its way through a model
groups       which patches each token stands for, as labels and as pixels
tokens       the same drawn on the image: over depth, for several strategies, in motion
similarity   how alike the tokens are that each layer reads
scan         the path of the scan before and after tokens went
layers       tokens and operations at each layer
curves       logs of runs
pareto       accuracy against cost over a grid
labels       names beside points
style        sizes, type and colours
files        PNG, SVG and GIF

matplotlib is imported when something is drawn; `groups.tile` needs none.
"""

from fambav.pictures.curves import curves
from fambav.pictures.files import animate, write
from fambav.pictures.layers import Work, bars
from fambav.pictures.pareto import pareto
from fambav.pictures.scan import paths
from fambav.pictures.similarity import Likeness, likeness, maps
from fambav.pictures.similarity import curves as likeness_curves
from fambav.pictures.tokens import frames, over_depth, strategies
from fambav.pictures.walk import Step, Walk, follow

__all__ = [
    "Likeness",
    "Step",
    "Walk",
    "Work",
    "animate",
    "bars",
    "curves",
    "follow",
    "frames",
    "likeness",
    "likeness_curves",
    "maps",
    "over_depth",
    "pareto",
    "paths",
    "strategies",
    "write",
]
