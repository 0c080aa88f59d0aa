"""What a selection does to tokens: to both streams, and to all that is known about each token.

kept tokens with sources -> group means      kept tokens without -> unchanged      others -> dropped
"""

from __future__ import annotations

import torch
from torch import Tensor

from fambav.arguments import instance
from fambav.layers import Tokens
from fambav.ops.cross_scan import select_rows
from fambav.ops.dispatch import expect_tensors
from fambav.ops.match import Selection, others
from fambav.ops.pool import pool
from fambav.ops.scan_aligned import carry_skipped_dt


def merge(tokens: Tokens, selection: Selection, weight: Tensor, *, summed: bool = False) -> Tokens:
    """Replace every group, a kept token and the sources folded into it, by its weighted mean.

    Both streams are averaged in float32 (float64 if they are) with the same groups, and come back
    in their own dtype.  A token without sources is unchanged to the last bit.

    Args:
        tokens: Sequences of equal length.
        selection: The groups and their new order; tokens in no group are dropped.
        weight: Weight of each token in its group, (batch, length), float32, greater than 0.
        summed: Make it the sum of the group instead; all weights are 1 then.

    Returns:
        The kept tokens, with the sizes of a group added up; without a grid, skipped step sizes or
        intermediates.

    Raises:
        ValueError: If tokens or selection is of another type.
    """
    instance("tokens", tokens, Tokens, "Tokens")
    instance("selection", selection, Selection, "a Selection")
    if not selection.source.shape[1]:
        return _taken(tokens, selection.keep)
    if selection.keep.shape[1] + selection.source.shape[1] < tokens.x.shape[1]:
        tokens, weight, selection = _without_dropped(tokens, weight, selection)
    x, residual, size, place = _pooled(tokens, selection, weight)  # (batch, kept, dim), ...
    if summed:
        number = torch.ones_like(weight).scatter_add(
            1, selection.target, weight.gather(1, selection.source)
        )
        number = number.gather(1, selection.keep)[..., None]  # (batch, kept, 1)
        x = (x * number).to(x.dtype)
        residual = None if residual is None else (residual * number).to(residual.dtype)
    return _moved(tokens, selection.keep, place)._replace(
        x=x, residual=residual, size=size, merged=True
    )


def unmerge(rows: Tensor, source: Tensor, dropped: Tensor) -> Tensor:
    """Return a row for each token of the start: a merged token's row for all its members.

    Args:
        rows: Of the kept tokens, (batch, length, dim).
        source: Index of each token of the start among them, -1 if it was dropped, (batch, start).
        dropped: The row of a dropped token, (batch, dim).

    Returns:
        (batch, start, dim).
    """
    expect_tensors(rows=rows, source=source, dropped=dropped)
    whole = select_rows(rows, source.clamp(min=0))
    return torch.where((source < 0)[..., None], dropped[:, None].to(whole.dtype), whole)


def mask(tokens: Tokens, kept: Tokens, keep: Tensor) -> Tokens:
    """Put the kept tokens back to where they were in x and residual, among zeros.

    Args:
        tokens: Before the reduction, (batch, length, dim).
        kept: After it.
        keep: Indices of the kept ones among those kept before, (batch, kept).
    """
    keep_index = keep if tokens.keep_index is None else tokens.keep_index.gather(1, keep)

    def among_zeros(stream: Tensor) -> Tensor:
        index = keep_index[..., None].expand_as(stream)
        return stream.new_zeros(tokens.x.shape).scatter(1, index, stream)

    residual = None if kept.residual is None else among_zeros(kept.residual)
    return kept._replace(
        x=among_zeros(kept.x), residual=residual, keep_index=keep_index, grid=tokens.grid
    )


def _pooled(
    tokens: Tokens, selection: Selection, weight: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Average both streams; a silent source is averaged in the residual stream only."""
    x, residual, size = tokens.x, tokens.residual, tokens.size
    if selection.silent is None or residual is None:
        return pool(x, residual, weight, size, selection)
    share = (~selection.silent).to(weight.dtype)
    of_x = weight.scatter(1, selection.source, weight.gather(1, selection.source) * share)
    first = pool(x, None, of_x, size, selection)
    return first.x, pool(residual, None, weight, size, selection).x, first.size, first.place


def _taken(tokens: Tokens, keep: Tensor) -> Tokens:
    """Return the tokens at `keep` as they are."""
    moved = _moved(tokens, keep, _inverse(keep, tokens.x.shape[1]))
    return moved._replace(
        x=select_rows(tokens.x, keep),
        residual=None if tokens.residual is None else select_rows(tokens.residual, keep),
        size=tokens.size.gather(1, keep),
        dropped=tokens.dropped or keep.shape[1] < tokens.x.shape[1],
    )


def _moved(tokens: Tokens, keep: Tensor, place: Tensor) -> Tokens:
    """Follow positions, class tokens and sources; `place` is the new index of each."""
    return tokens._replace(
        position=tokens.position.gather(1, keep),
        cls_index=place.gather(1, tokens.cls_index),
        source=_followed(tokens.source, place),
        grid=None,
        skipped_dt=None,
        intermediates=None,
    )


def _without_dropped(
    tokens: Tokens, weight: Tensor, selection: Selection
) -> tuple[Tokens, Tensor, Selection]:
    """Leave out the tokens that are in no group."""
    members = torch.cat((selection.keep, selection.source), dim=1).sort(dim=1).values
    place = _inverse(members, tokens.x.shape[1])
    keep, source, target = (
        place.gather(1, index) for index in (selection.keep, selection.source, selection.target)
    )
    fewer = selection._replace(keep=keep, source=source, target=target)
    return _taken(tokens, members), weight.gather(1, members), fewer


def _inverse(keep: Tensor, length: int) -> Tensor:
    """Return the place in `keep` of each index below `length`, -1 if it is not there."""
    batch, kept = keep.shape
    rank = torch.arange(kept, device=keep.device).expand(batch, kept)
    return torch.full((batch, length), -1, device=keep.device).scatter(1, keep, rank)


def _followed(source: Tensor | None, place: Tensor) -> Tensor | None:
    if source is None:
        return None
    return torch.where(source < 0, source, place.gather(1, source.clamp(min=0)))


def put_class_tokens(
    selection: Selection, cls_index: Tensor, policy: str, *, length: int
) -> Selection:
    """Move the class tokens within the order of what is kept.

    Args:
        selection: Keeps the class tokens, somewhere among the patches.
        cls_index: Where they are before, the same for every sample, (batch, k), int64.
        policy: "exact" leaves them at their rank among the kept patches; "proportional" puts one
            from p of n tokens to p * kept // n; "middle" puts the only one behind half of the
            patches.
        length: Tokens before.
    """
    keep, kept = selection.keep, selection.keep.shape[1]
    if policy == "exact":
        return selection
    new = torch.full_like(cls_index, (kept - 1) // 2)
    if policy == "proportional":
        new = cls_index * kept // length
    is_class = (keep[..., None] == cls_index[:, None]).any(dim=2)  # (batch, kept)
    patches = keep.gather(1, is_class.long().argsort(dim=1, stable=True))
    patches = patches[:, : kept - cls_index.shape[1]]
    return selection._replace(keep=interspersed(patches, cls_index, new))


def interspersed(patches: Tensor, cls_index: Tensor, new: Tensor) -> Tensor:
    """Put class tokens among patches: (batch, patches) -> (batch, patches + k), int64.

    Args:
        patches: Indices of the patches in their order.
        cls_index: Indices of the class tokens, (batch, k).
        new: Where in the result they are to be, distinct, (batch, k), int64.
    """
    length = patches.shape[1] + cls_index.shape[1]
    order = patches.new_empty(patches.shape[0], length).scatter(1, others(new, length), patches)
    return order.scatter(1, new, cls_index)


def carried_dt(tokens: Tokens, keep: Tensor) -> Tensor:
    """Carry the step sizes of removed tokens to the token scanned next, in every direction.

    Args:
        tokens: Before they go, with the intermediates `delta` and `order`.
        keep: Indices that stay, (batch, kept).

    Returns:
        `Tokens.skipped_dt` of the kept tokens, (batch, directions, kept, inner), float32.

    Raises:
        ValueError: If the intermediates are not there.
    """
    delta, order = tokens.intermediate("delta"), tokens.intermediate("order")
    each = [
        carry_skipped_dt(
            delta[:, direction],
            None if tokens.skipped_dt is None else tokens.skipped_dt[:, direction],
            keep,
            order[:, direction],
        )
        for direction in range(delta.shape[1])
    ]
    return torch.stack(each, dim=1)  # (batch, directions, kept, inner)
