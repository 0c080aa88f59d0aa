"""What TensorBoard shows of a model at the end of its training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fambav.build import batches
from fambav.config import Config
from fambav.data import DataSet
from fambav.models import Backbone
from fambav.pictures import groups
from fambav.pictures.tokens import spread
from fambav.pictures.walk import follow

_MOST = 11  # layers, the last one among them


def tokens(config: Config, net: nn.Module, found: DataSet) -> NDArray[np.uint8] | None:
    """Draw which patches of the first held-out image each token stands for, layer by layer.

    Nothing is drawn from a random generator, and the model stays as it is.

    Args:
        config: The settings.
        net: The model.
        found: The data set.

    Returns:
        The image at the start and behind each layer, or 11 of them, side by side, (3, height,
        width); None if the model keeps every token.
    """
    if not isinstance(net, Backbone) or not net.schedule.removed:
        return None
    statistics = found.statistics(config.data.data_stats)
    image = batches.eval_transform(config, statistics, net.img_size)(found.val[0][0])
    over = groups.depths(follow(net, image))
    mean, std = (torch.tensor(each)[:, None, None] for each in statistics)
    pixels = (image * std + mean).clamp(0, 1).permute(1, 2, 0).double().numpy()
    colour = groups.colours(over)
    chosen = (0, *spread(len(over) - 1, _MOST))
    tiles = [groups.tile(pixels, over[layer], colour) for layer in chosen]
    room = np.full((3, tiles[0].shape[1], tiles[0].shape[2] // 20), 255, dtype=np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, room)][:-1], axis=2)
