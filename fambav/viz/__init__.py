"""Figures of token reduction and of training, and one HTML page of runs and grids.

    figure = fambav.viz.groups(model, image)    # a matplotlib Figure; named as `fambav show --what`

trace      one image on its way through a model
patches    the patches of each token, as labels and pixels
compare    the strategies side by side on the same weights
figures    tokens drawn on the image: groups, strategies, animation
measures   what layers read and compute: similarity, mean_similarity, scan, layers
logs       curves of training
confusion_matrix  what the samples of each class are taken for
masks      image, truth and prediction of a segmentation or a detection: masks, boxes
front      accuracy against cost over a grid: pareto
style      sizes, type, colours and files
render     every figure of a run, as files
report     the page

matplotlib is imported when something is drawn.
"""

from fambav.viz.confusion_matrix import confusion
from fambav.viz.figures import animation, groups, strategies
from fambav.viz.front import pareto
from fambav.viz.logs import curves
from fambav.viz.masks import boxes, masks
from fambav.viz.measures import layers, mean_similarity, scan, similarity
from fambav.viz.render import Picture, Source, render
from fambav.viz.report import write_report
from fambav.viz.style import require_matplotlib, save
from fambav.viz.trace import TokenTrace, trace_stages, trace_tokens

__all__ = [
    "Picture",
    "Source",
    "TokenTrace",
    "animation",
    "boxes",
    "confusion",
    "curves",
    "groups",
    "layers",
    "masks",
    "mean_similarity",
    "pareto",
    "render",
    "require_matplotlib",
    "save",
    "scan",
    "similarity",
    "strategies",
    "trace_stages",
    "trace_tokens",
    "write_report",
]
