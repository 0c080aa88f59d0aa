"""Where tokens have a double: what a search looks at before it tries anything.

alike[layer][r]    the cosine of the r-th most similar pair, the mean over images
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.engine.precision import Precision
from fambav.layers import Tokens
from fambav.models import Backbone
from fambav.ops.match import others
from fambav.reduction import no_reduction


@torch.no_grad()
def similarity(net: Backbone, images: Tensor, precision: Precision) -> Tensor:
    """Return how alike the r-th best pair of patches is at each layer of the model.

    Patches at even places are compared with those at odd places, on the normalised stream, as
    `fambav.reduction.merging` does; all tokens are there.

    Args:
        net: In evaluation mode; it keeps the reduction that it has.
        images: (batch, channels, height, width), on the model's device.
        precision: Format of the forward pass.

    Returns:
        (depth, pairs), float64, on the CPU; falling along a row, -1 to 1.
    """
    before, found = net.reduction, list[Tensor]()

    def look(tokens: Tokens) -> Tokens:
        found.append(_falling(tokens).mean(dim=0).cpu())
        return tokens

    net.reduction = no_reduction(net.info).eval()
    try:
        with precision.autocast():
            tokens = net.embed(images)
            for layer, block in enumerate(net.layers):
                tokens = block(tokens, net.hooks(layer, tokens)._replace(between=look))
    finally:
        net.reduction = before
    return torch.stack(found)


def _falling(tokens: Tokens) -> Tensor:
    """Return the cosine of every even patch with the odd one most like it, the highest first."""
    places = others(tokens.class_places, tokens.x.shape[1])
    patches = tokens.x.gather(1, places[..., None].expand(-1, -1, tokens.x.shape[2]))
    patches = F.normalize(patches.double(), dim=2, eps=1e-30)
    best = (patches[:, 0::2] @ patches[:, 1::2].mT).amax(dim=2)
    return best.sort(dim=1, descending=True).values


def unlikeness(alike: Tensor, before: Sequence[int], after: Sequence[int]) -> float:
    """Sum 1 - cosine over the pairs that a plan merges more than another.

    Args:
        alike: As `similarity` returns it.
        before: Tokens removed at each layer by the one.
        after: By the other, which may remove fewer at some layers.
    """
    total = 0.0
    for row, old, new in zip(alike, before, after, strict=True):
        more = 1 - row[min(old, new) : max(old, new)]
        beyond = abs(new - old) - len(more)  # no pair is left for these
        total += (float(more.sum()) + beyond) * (1 if new > old else -1)
    return total
