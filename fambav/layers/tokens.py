"""The tokens that travel through a model, and what is known about each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fambav.ops.cross_scan import select_rows


class Intermediates(NamedTuple):
    """What a mixer computed on its way, in the order of its tokens; None where it was not wanted.

    Attributes:
        order: Index of the token of each scan step, (batch or 1, directions, length), int64; the
            directions of a Vim mixer are forward, backward.  None of a mixer that ran fused.
        u: What is scanned, (batch, directions, length, inner).
        delta: Step sizes after softplus, shaped like u, or one for each head.
        B, C: Weights of a token into and out of the state, (batch, directions, length, state).
        y: Output of the scan with its skip, before the gate, shaped like u.
        z: Gate before its silu, (batch, length, inner).
        mixed: The mixer's output, (batch, length, dim).
        gated: Sum over channels of max(0, y silu(z)), (batch, directions, length, 1), float32.
        gated_unclipped: Sum over channels of y silu(z), likewise.
        ungated: Sum over channels of max(0, y), likewise.
        ungated_unclipped: Sum over channels of y, likewise.
    """

    order: Tensor | None = None
    u: Tensor | None = None
    delta: Tensor | None = None
    B: Tensor | None = None
    C: Tensor | None = None
    y: Tensor | None = None
    z: Tensor | None = None
    mixed: Tensor | None = None
    gated: Tensor | None = None
    gated_unclipped: Tensor | None = None
    ungated: Tensor | None = None
    ungated_unclipped: Tensor | None = None

    def at(self, index: Tensor) -> Intermediates:
        """Return those of the tokens at `index`, (batch, k); `order` stays as it is."""

        def rows(x: Tensor) -> Tensor:
            return select_rows(x, index if x.dim() == 3 else index[:, None])

        return Intermediates(self.order, *(None if x is None else rows(x) for x in self[1:]))


OUTPUT = frozenset({"mixed"})  # known without a mixer that returns intermediates
STATE = frozenset({"delta", "B", "C", "ungated", "ungated_unclipped"})  # known without a gate
INTERMEDIATES = frozenset(Intermediates._fields) - {"order"}


class Tokens(NamedTuple):
    """A batch of token sequences of equal length on its way through a model.

    Attributes:
        x: Output of the last mixer or input of the next, (batch, length, dim).
        residual: Sum of the mixer outputs before it, (batch, length, dim); None before layer 0.
        size: Patches behind each token, 1 for a class token, (batch, length), float32.
        position: Index at the start of the token, or of the token that absorbed the others of its
            group, (batch, length), int64.
        cls_index: Where the k class tokens are now, exact for each sample, (batch, k), int64.
        source: Index now of the token that each token of the start is part of, -1 if that was
            dropped, (batch, start length), int64; None unless tracing.
        merged: Whether tokens may stand for several of the start; where not, all sizes are 1.
        dropped: Whether tokens of the start may be part of none.
        grid: Height and width of the grid that the patches form, row by row; None if they do not.
        start_grid: That of the start.
        skipped_dt: Step sizes, summed, of the tokens removed between each token and the one scanned
            before it, (batch, directions, length, inner), float32; None unless they are carried.
        keep_index: Where removed tokens are masked, the indices in x and residual of the kept ones,
            (batch, kept), int64; all other fields are about those.  None where none is masked.
        intermediates: Of the last mixer; None if none were wanted or tokens went since.
    """

    x: Tensor
    residual: Tensor | None
    size: Tensor
    position: Tensor
    cls_index: Tensor
    source: Tensor | None = None
    merged: bool = False
    dropped: bool = False
    grid: tuple[int, int] | None = None
    start_grid: tuple[int, int] | None = None
    skipped_dt: Tensor | None = None
    keep_index: Tensor | None = None
    intermediates: Intermediates | None = None

    @classmethod
    def start(
        cls,
        x: Tensor,
        *,
        cls_index: tuple[int, ...],
        grid: tuple[int, int] | None = None,
        trace: bool = False,
    ) -> Tokens:
        """Wrap embedded tokens: of size 1, each at its own position, without a residual.

        Args:
            x: The embedded sequence, class tokens included, (batch, length, dim).
            cls_index: Where the class tokens are; empty without one.
            grid: Height and width of the grid that the patches form.
            trace: Carry `source`.
        """
        batch, length, _ = x.shape
        position = torch.arange(length, device=x.device).expand(batch, length)
        columns = (position[:, index : index + 1] for index in cls_index)
        return cls(
            x=x,
            residual=None,
            size=torch.ones(batch, length, device=x.device),
            position=position,
            cls_index=torch.cat((position[:, :0], *columns), dim=1),  # (batch, k), also for k = 0
            source=position if trace else None,
            grid=grid,
            start_grid=grid,
        )

    def intermediate(self, name: str) -> Tensor:
        """Return one of the intermediates.

        Raises:
            ValueError: If the mixer did not return it.
        """
        found: Tensor | None = getattr(self.intermediates, name, None)
        if found is None:
            raise ValueError(
                f"intermediates have no {name}, expected it of the mixer before the reduction"
            )
        return found

    def kept(self) -> Tokens:
        """Return the kept tokens alone, without masked ones in between."""
        if self.keep_index is None:
            return self
        found = self.intermediates
        return self._replace(
            x=select_rows(self.x, self.keep_index),
            residual=None if self.residual is None else select_rows(self.residual, self.keep_index),
            grid=None,
            keep_index=None,
            intermediates=None if found is None else found.at(self.keep_index),
        )


def zero_masked(x: Tensor, keep_index: Tensor | None) -> Tensor:
    """Set masked tokens, which a mixer's biases reach, to zero again, (batch, length, dim)."""
    if keep_index is None:
        return x
    mask = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device).scatter(1, keep_index, 1)
    return x * mask[..., None]
