"""The residual block: add, normalise, mix, with room for something between norm and mixer.

residual = residual + drop_path(x)      tokens = between(norm(residual), residual)      x = mixer
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fambav.layers.drop import DropPath
from fambav.layers.tokens import Tokens
from fambav.ops import add_rms_norm

Between = Callable[[Tokens], Tokens]


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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the normalised sum in x's dtype, and the sum, both shaped like x."""
        normed, residual = add_rms_norm(x, residual, self.weight, eps=self.eps)
        return normed, residual


class Block(nn.Module):
    """A mixer on the normalised residual stream.

    Args:
        dim: Width of a token.
        mixer: Maps (batch, length, dim) to the same shape.
        drop_path: Probability that a sample skips the output of the block before.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = AddNorm(dim)
        self.drop_path = DropPath(drop_path)
        self.grad_checkpointing = False

    def forward(self, tokens: Tokens, between: Between) -> Tokens:
        """Return tokens with the mixer's output as x and the sum of everything before as residual.

        Args:
            tokens: Output of the block before; without a residual in the first block.
            between: Called with the normalised sum as x; may return fewer tokens.
        """
        # Outside of the part that is computed twice, so that randomness is drawn once.
        tokens = tokens._replace(x=self.drop_path(tokens.x))
        if self.grad_checkpointing and torch.is_grad_enabled():
            again: Tokens = checkpoint(
                self.mix, tokens, between, use_reentrant=False, preserve_rng_state=False
            )
            return again
        return self.mix(tokens, between)

    def mix(self, tokens: Tokens, between: Between) -> Tokens:
        """Do what `forward` does, without drop path and without checkpointing."""
        x, residual = self.norm(tokens.x, tokens.residual)
        tokens = between(tokens._replace(x=x, residual=residual))
        return tokens._replace(x=self.mixer(tokens.x))
