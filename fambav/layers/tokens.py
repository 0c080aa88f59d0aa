"""The tokens that travel through a model, and what is known about each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Signals(NamedTuple):
    """What a mixer computed on its way, in the order of its tokens; only what was asked for.

    Attributes:
        order: Places of the tokens in the order in which they are scanned, (batch or 1,
            directions, length), int64; the directions of a Vim mixer are forward, backward.  None
            of a mixer that was not asked.
        u: What is scanned, (batch, directions, length, inner).
        delta: Step sizes after softplus, shaped like u.
        B, C: Weights of a token into and out of the state, (batch, directions, length, state).
        y: Output of the scan with its skip, before the gate, shaped like u.
        z: Gate before its silu, (batch, length, inner).
        mixed: The mixer's output, (batch, length, dim).
    """

    order: Tensor | None = None
    u: Tensor | None = None
    delta: Tensor | None = None
    B: Tensor | None = None
    C: Tensor | None = None
    y: Tensor | None = None
    z: Tensor | None = None
    mixed: Tensor | None = None

    def at(self, places: Tensor) -> Signals:
        """Return what is told of some tokens, in their order; that of the scan stays.

        Args:
            places: Along length, (batch, some), int64.
        """
        told = (None if tensor is None else _at(tensor, places) for tensor in self[1:])
        return Signals(self.order, *told)


class Tokens(NamedTuple):
    """A batch of token sequences of equal length on its way through a model.

    Attributes:
        x: Output of the last mixer or input of the next, (batch, length, dim).
        residual: Sum of the mixer outputs before it, (batch, length, dim); None before layer 0.
        size: Patches behind each token, 1 for a class token, (batch, length), float32.
        position: Place at the start of the token, or of the token that absorbed the others of its
            group, (batch, length), int64.
        class_places: Where the k class tokens are now, exact for each sample, (batch, k), int64.
        source: Place now of the token that each token of the start is part of, -1 if that was
            dropped, (batch, start length), int64; None unless tracing.
        grid: Height and width of the grid that the patches form, row by row; None if they do not.
        gap: Step sizes, summed, of the tokens that went between each token and the one scanned
            before it, (batch, directions, length, inner), float32; None unless they are kept.
        alive: Where masked tokens stay in x and residual, the places there of those that are left,
            (batch, left), int64; all else is about those. None where tokens that go are gone.
        signals: What the last mixer computed; None if nothing was asked for or tokens went since.
    """

    x: Tensor
    residual: Tensor | None
    size: Tensor
    position: Tensor
    class_places: Tensor
    source: Tensor | None = None
    grid: tuple[int, int] | None = None
    gap: Tensor | None = None
    alive: Tensor | None = None
    signals: Signals | None = None

    @classmethod
    def start(
        cls,
        x: Tensor,
        *,
        class_places: tuple[int, ...],
        grid: tuple[int, int] | None = None,
        trace: bool = False,
    ) -> Tokens:
        """Wrap embedded tokens.

        Args:
            x: The embedded sequence, class tokens included, (batch, length, dim).
            class_places: Where the class tokens stand; empty without one.
            grid: Height and width of the grid that the patches form.
            trace: Carry `source`, which says where each token of the start went.

        Returns:
            Tokens of size 1, each at its own position, without a residual.
        """
        batch, length, _ = x.shape
        position = torch.arange(length, device=x.device).expand(batch, length)
        places = (position[:, place : place + 1] for place in class_places)
        return cls(
            x=x,
            residual=None,
            size=torch.ones(batch, length, device=x.device),
            position=position,
            class_places=torch.cat((position[:, :0], *places), dim=1),
            source=position if trace else None,
            grid=grid,
        )

    def living(self) -> Tokens:
        """Return the tokens that are left, without the masked ones in between."""
        if self.alive is None:
            return self
        return self._replace(
            x=_at(self.x, self.alive),
            residual=None if self.residual is None else _at(self.residual, self.alive),
            grid=None,
            alive=None,
            signals=None if self.signals is None else self.signals.at(self.alive),
        )


def _at(stream: Tensor, places: Tensor) -> Tensor:
    """Pick places along the last axis but one, (batch, ..., length, width)."""
    rows = places[..., None] if stream.dim() == 3 else places[:, None, :, None]
    return stream.gather(-2, rows.expand((*stream.shape[:-2], -1, stream.shape[-1])))


class Ask(NamedTuple):
    """What a mixer is told and asked beside its features.

    Attributes:
        tokens: Whose features they are: positions, grid and gaps.
        needs: Fields of `Signals` to return.
        gap: How the state ages over tokens that went; see `registry.GAP_POLICIES`.  None does not
            let it age.
    """

    tokens: Tokens
    needs: frozenset[str] = frozenset()
    gap: str | None = None
