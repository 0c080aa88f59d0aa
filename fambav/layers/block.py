"""The residual block: add, normalise, mix, with hooks at three points.

tokens = before(tokens)
residual = residual + drop_path(x)      tokens = between(norm(residual), residual)
tokens = after(mixer(tokens))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooked
from torch.utils.checkpoint import checkpoint

from fambav.layers.drop import DropPath
from fambav.layers.tokens import OUTPUT, Intermediates, Tokens, zero_masked
from fambav.ops import add_rms_norm

Hook = Callable[[Tokens], Tokens]


def unchanged(tokens: Tokens) -> Tokens:
    """Return the tokens themselves."""
    return tokens


class Hooks(NamedTuple):
    """What is done to the tokens at a block, and what its mixer needs and returns beside x.

    Attributes:
        before: Called with the output of the block before, ahead of its drop path.
        between: Called with the normalised sum as x.
        after: Called with the mixer's output as x and its intermediates.
        want: Intermediates that are read behind the mixer, fields of `Intermediates`.
        gap_policy: How the scan's state ages over tokens that went, see `registry.GAP_POLICIES`;
            None if it does not.
        positions: Whether the mixer has to know where the tokens come from.
    """

    before: Hook = unchanged
    between: Hook = unchanged
    after: Hook = unchanged
    want: frozenset[str] = frozenset()
    gap_policy: str | None = None
    positions: bool = False

    @property
    def with_tokens(self) -> bool:
        """Whether the mixer has to be called with the tokens; for its output alone it has not."""
        return bool(self.want - OUTPUT) or self.gap_policy is not None or self.positions


NO_HOOKS = Hooks()


class Add(nn.Module):
    """Add to the residual stream, which stays in float32, and normalise nothing."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the sum in x's dtype, and the sum, both shaped like x."""
        total = x.to(torch.promote_types(x.dtype, torch.float32))
        if residual is not None:
            total = residual + total
        return total.to(x.dtype), total


class AddNorm(nn.Module):
    """Add to the residual stream, which stays in float32, and normalise the sum.

    Args:
        dim: Width of a token.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the normalised sum in x's dtype, and the sum, both shaped like x.

        Args:
            x: (batch, ..., dim).
            residual: Shaped like x, or None for zeros.
            factor: Of each sample of x, (batch,), or None for 1.
        """
        normed, residual = add_rms_norm(x, residual, self.weight, eps=self.eps, factor=factor)
        return normed, residual


class ResidualBlock(nn.Module):
    """What a block does, with parts that its subclass makes, whose names are those of its weights.

    Attributes:
        norm: Maps x and residual to the normalised sum and the sum.
        mixer: Maps (batch, length, dim) to the same shape; given `Tokens` too, it also returns
            `Intermediates`, see `Mamba.forward`.
        drop_path: Of the output of the block before.
        grad_checkpointing: Compute norm and mixer again in the backward pass.
    """

    norm: nn.Module
    mixer: nn.Module
    drop_path: nn.Module
    grad_checkpointing = False

    def forward(self, tokens: Tokens, hooks: Hooks = NO_HOOKS) -> Tokens:
        """Return tokens with the mixer's output as x and the sum of everything before as residual.

        Args:
            tokens: Output of the block before; without a residual in the first block.
            hooks: May return fewer tokens.
        """
        tokens = hooks.before(tokens)
        # Outside of the part that is computed twice, so that randomness is drawn once.
        factor = None
        if type(self.norm) is AddNorm and _is_plain(self.drop_path):
            factor = cast(DropPath, self.drop_path).factor(tokens.x)
        else:
            tokens = tokens._replace(x=self.drop_path(tokens.x))
        mix = partial(self._mix, hooks, factor)
        if self.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(mix, tokens, use_reentrant=False, preserve_rng_state=False)
        else:
            tokens = mix(tokens)
        return hooks.after(tokens)

    def _mix(self, hooks: Hooks, factor: Tensor | None, tokens: Tokens) -> Tokens:
        factors = [] if factor is None else [factor]
        x, residual = self.norm(tokens.x, tokens.residual, *factors)
        tokens = hooks.between(tokens._replace(x=x, residual=residual))
        if not hooks.with_tokens:
            x = self.mixer(tokens.x)
            found = Intermediates(mixed=x) if hooks.want else None
            return tokens._replace(x=x, intermediates=found)
        x, found = self.mixer(tokens.x, tokens, want=hooks.want, gap_policy=hooks.gap_policy)
        return tokens._replace(x=zero_masked(x, tokens.keep_index), intermediates=found)


def _is_plain(drop_path: nn.Module) -> bool:
    """Whether a drop path is ours and nothing watches its calls."""
    watched = drop_path._forward_hooks or drop_path._forward_pre_hooks or drop_path._backward_hooks
    return type(drop_path) is DropPath and not (watched or hooked._has_any_global_hook())


class Block(ResidualBlock):
    """A mixer on the normalised residual stream.

    Args:
        dim: Width of a token.
        mixer: As of a `ResidualBlock`.
        drop_path: Probability that a sample skips the output of the block before.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = AddNorm(dim)
        self.drop_path = DropPath(drop_path)
