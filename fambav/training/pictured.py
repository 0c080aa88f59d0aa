"""The picture that TensorBoard gets of a model at the end of its training."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fambav.config import Config
from fambav.data import DataSet
from fambav.models import Backbone, Hierarchical
from fambav.training import batches


def tokens(config: Config, net: nn.Module, data_set: DataSet) -> NDArray[np.uint8] | None:
    """Draw which patches of the first held-out image each token stands for, layer by layer.

    Nothing is drawn from a random generator, and the model stays as it is.

    Returns:
        The image at the start and behind each layer, or 11 of them, side by side, (3, height,
        width); None if the model keeps every token.
    """
    reducible = isinstance(net, Backbone) or (isinstance(net, Hierarchical) and net.reducible)
    if not reducible or not cast(Any, net).reduction.schedule.removed:
        return None
    from fambav.viz.patches import strip  # viz opens runs, so it stands above this package
    from fambav.viz.trace import trace_stages

    statistics = data_set.statistics(config.data.data_stats)
    size = cast(Any, net).img_size
    image = batches.eval_transform(config, statistics, size)(data_set.val[0][0])
    return strip(trace_stages(net, image, statistics=statistics))
