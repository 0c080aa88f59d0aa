"""What happens to tokens when a method has chosen: to both streams, and to all that is known.

kept tokens with sources -> group means      kept tokens without -> unchanged      others -> gone
"""

from __future__ import annotations

import torch
from torch import Tensor

from fambav.layers import Tokens
from fambav.ops.match import Selection, others
from fambav.ops.pool import pool
from fambav.ops.scan_aligned import carry_skipped_dt


def merge(tokens: Tokens, selection: Selection, weight: Tensor, *, summed: bool = False) -> Tokens:
    """Replace every group, a kept token and the sources folded into it, by its weighted mean.

    Both streams are averaged in float32 (float64 if they are) with the same groups, and come back
    in their own dtype.  A token without sources is unchanged to the last bit.

    Args:
        tokens: Sequences of equal length.
        selection: The groups and their new order; tokens in no group go.
        weight: Weight of each token in its group, (batch, length), float32, greater than 0.
        summed: Make it the sum of the group instead; all weights are 1 then.

    Returns:
        The kept tokens, with the sizes of a group added up; without a grid, gap or signals.
    """
    length = tokens.x.shape[1]
    count = selection.source.shape[1]
    if not count:
        return _taken(tokens, selection.keep)
    if selection.keep.shape[1] + count < length:
        tokens, weight, selection = _without_others(tokens, weight, selection)
    x, residual, size, place = _pooled(tokens, selection, weight)
    if summed:
        number = torch.ones_like(weight).scatter_add(
            1, selection.target, weight.gather(1, selection.source)
        )
        number = number.gather(1, selection.keep)[..., None]
        x = (x * number).to(x.dtype)
        residual = None if residual is None else (residual * number).to(residual.dtype)
    return tokens._replace(
        x=x,
        residual=residual,
        size=size,
        position=tokens.position.gather(1, selection.keep),
        class_places=place.gather(1, tokens.class_places),
        source=_followed(tokens.source, place),
        grid=None,
        gap=None,
        signals=None,
    )


def unmerge(rows: Tensor, source: Tensor, dropped: Tensor) -> Tensor:
    """Return a row for each token of the start.

    Args:
        rows: Of the tokens that are left, (batch, length, dim).
        source: Place of each token of the start among them, -1 if it was dropped, (batch, start).
        dropped: What stands for one that was dropped, (batch, dim).

    Returns:
        A copy of a merged token's row for all its members, (batch, start, dim).
    """
    whole = _rows(rows, source.clamp(min=0))
    return torch.where((source < 0)[..., None], dropped[:, None].to(whole.dtype), whole)


def _pooled(
    tokens: Tokens, selection: Selection, weight: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Average both streams; where a source is silent, x does without it."""
    x, residual, size = tokens.x, tokens.residual, tokens.size
    if selection.silent is None or residual is None:
        return pool(x, residual, weight, size, selection)
    loud = (~selection.silent).to(weight.dtype)
    heard = weight.scatter(1, selection.source, weight.gather(1, selection.source) * loud)
    first = pool(x, None, heard, size, selection)
    return first.x, pool(residual, None, weight, size, selection).x, first.size, first.place


def _taken(tokens: Tokens, keep: Tensor) -> Tokens:
    """Return the tokens at `keep` as they are."""
    place = _inverse(keep, tokens.x.shape[1])
    return tokens._replace(
        x=_rows(tokens.x, keep),
        residual=None if tokens.residual is None else _rows(tokens.residual, keep),
        size=tokens.size.gather(1, keep),
        position=tokens.position.gather(1, keep),
        class_places=place.gather(1, tokens.class_places),
        source=_followed(tokens.source, place),
        grid=None,
        gap=None,
        signals=None,
    )


def _without_others(
    tokens: Tokens, weight: Tensor, selection: Selection
) -> tuple[Tokens, Tensor, Selection]:
    """Leave out the tokens that are in no group."""
    left = torch.cat((selection.keep, selection.source), dim=1).sort(dim=1).values
    place = _inverse(left, tokens.x.shape[1])
    keep, source, target = (
        place.gather(1, p) for p in (selection.keep, selection.source, selection.target)
    )
    fewer = selection._replace(keep=keep, source=source, target=target)
    return _taken(tokens, left), weight.gather(1, left), fewer


def _rows(stream: Tensor, places: Tensor) -> Tensor:
    return stream.gather(1, places[..., None].expand(-1, -1, stream.shape[2]))


def _inverse(keep: Tensor, length: int) -> Tensor:
    """Return where each of `length` places is in `keep`, -1 if it is not there."""
    batch, kept = keep.shape
    rank = torch.arange(kept, device=keep.device).expand(batch, kept)
    return torch.full((batch, length), -1, device=keep.device).scatter(1, keep, rank)


def _followed(source: Tensor | None, place: Tensor) -> Tensor | None:
    """Say where tokens are now that were at `source`; -1 stays."""
    if source is None:
        return None
    return torch.where(source < 0, source, place.gather(1, source.clamp(min=0)))


def put_class_tokens(
    selection: Selection, class_places: Tensor, policy: str, *, length: int
) -> Selection:
    """Move the class tokens within the order of what is kept.

    Args:
        selection: Keeps the class tokens, somewhere among the patches.
        class_places: Where they are before, the same for every sample, (batch, k), int64.
        policy: "exact" leaves them at their rank among the patches that are left; "proportional"
            puts one from place p of n to p * kept // n; "middle" puts the only one behind half of
            the patches.
        length: Tokens before.
    """
    keep, kept = selection.keep, selection.keep.shape[1]
    if policy == "exact":
        return selection
    new = torch.full_like(class_places, (kept - 1) // 2)
    if policy == "proportional":
        new = class_places * kept // length
    is_class = (keep[..., None] == class_places[:, None]).any(dim=2)
    patches = keep.gather(1, is_class.long().argsort(dim=1, stable=True))
    patches = patches[:, : kept - class_places.shape[1]]
    return selection._replace(keep=interspersed(patches, class_places, new))


def interspersed(patches: Tensor, class_places: Tensor, new: Tensor) -> Tensor:
    """Put class tokens among patches.

    Args:
        patches: Places of the patches in their order, (batch, patches).
        class_places: Places of the class tokens, (batch, k).
        new: Where in the result they are to stand, distinct, (batch, k), int64.

    Returns:
        The places of all in their order, (batch, patches + k), int64.
    """
    length = patches.shape[1] + class_places.shape[1]
    order = patches.new_empty(patches.shape[0], length).scatter(1, others(new, length), patches)
    return order.scatter(1, new, class_places)


def aged(tokens: Tokens, keep: Tensor) -> Tensor:
    """Hand the step sizes of tokens that go to the token scanned next, in every direction.

    Args:
        tokens: Before they go, with `signals.delta` and `signals.order`.
        keep: Places that stay, (batch, kept).

    Returns:
        The gap of each token that stays, (batch, directions, kept, inner), float32.
    """
    signals = tokens.signals
    if signals is None or signals.delta is None or signals.order is None:
        raise ValueError("signals have no delta, expected it from the mixer before the reduction")
    delta, order = signals.delta, signals.order
    found = [
        carry_skipped_dt(
            delta[:, end],
            None if tokens.gap is None else tokens.gap[:, end],
            keep,
            order[:, end],
        )
        for end in range(delta.shape[1])
    ]
    return torch.stack(found, dim=1)
