"""Tokens that a reduction keeps, and their features."""

import torch

from tests.ops.agreement import draw


def at(x, places):
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def in_order(length, *, reverse):
    order = torch.arange(length)[None]
    return order.flip(1) if reverse else order


def some_places(batch, length, kept, name="places"):
    """Places that stay, ascending, another choice for each sample."""
    score = draw(name, batch, length).detach()
    return score.topk(kept, dim=1).indices.sort(dim=1).values
