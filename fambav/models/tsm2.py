"""TSM2: patches of series, mixed along time and across variates by selective scans.

    past -> standardise -> patches -> depth x (mix tokens, mix variates) -> norm -> linear -> undo

Source: MambaMixer (Behrouz et al., arXiv:2403.19888), section 5.  Its code was never published and
the paper prints no sizes; every choice that it leaves open stands in docs/forecasting.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from fambav.layers import Dropout, Mamba
from fambav.models.flops import Cost, ForecasterCost, mamba_cost, times, total
from fambav.models.forecaster import Forecaster, register, standardise


class TSM2(Forecaster):
    """Selective scans over the patches of a variate, and over the variates of a patch.

    The scan across variates runs both ways in the order of the columns, so that order matters.

    Args:
        lookback: Rows that a forecast is made from: a patch and a multiple of the stride.
        horizon: Rows that are forecast.
        dim: Width of a token.
        depth: Number of layers.
        patch: Rows in a patch.
        stride: Rows from one patch to the next.
        state: Numbers of state per channel.
        expand: Inner width, in units of dim.
        drop_rate: Dropout of the patches, of each mixer's output and before the head.
        mix_variates: Whether variates see each other; without it they are forecast one by one.
        joint_norm: Normalise the output over tokens and width at once, instead of first over width
            and then over tokens.

    Raises:
        ValueError: If the last rows of the lookback would be in no patch.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("A_log", "D")

    def __init__(
        self,
        *,
        lookback: int = 512,
        horizon: int = 96,
        dim: int = 32,
        depth: int = 2,
        patch: int = 16,
        stride: int = 8,
        state: int = 16,
        expand: int = 2,
        drop_rate: float = 0.0,
        mix_variates: bool = True,
        joint_norm: bool = False,
    ) -> None:
        super().__init__(lookback=lookback, horizon=horizon)
        if lookback < patch or (lookback - patch) % stride:
            multiple = f"{patch} and a multiple of {stride}"
            raise ValueError(f"lookback is {lookback}, expected {multiple}, whole patches")
        self.patch, self.stride = patch, stride
        length = (lookback - patch) // stride + 1
        self.embed = nn.Linear(patch, dim)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(length, dim))
        self.drop = Dropout(drop_rate)
        sizes = dict(state=state, expand=expand)
        self.layers = nn.ModuleList(
            Layer(dim, layer, drop=drop_rate, mix_variates=mix_variates, **sizes)
            for layer in range(depth)
        )
        self.norm: nn.Module = nn.LayerNorm((length, dim)) if joint_norm else TwoNorms(length, dim)
        self.head = nn.Linear(length * dim, horizon)

    def forecast(self, rows: Tensor) -> Tensor:
        """Continue each variate: (batch, variates, lookback) -> (batch, variates, horizon)."""
        rows, mean, std = standardise(rows)
        patches = rows.unfold(-1, self.patch, self.stride)  # (batch, variates, tokens, patch)
        x = self.drop(self.embed(patches) + self.pos_embed)  # (batch, variates, tokens, dim)
        tokens, variates = [x], [x]
        for layer in self.layers:
            layer(tokens, variates)
        last = self.drop(self.norm(variates[-1])).flatten(2)  # (batch, variates, tokens * dim)
        out: Tensor = self.head(last) * std + mean
        return out

    def flop_parts(self, variates: int) -> ForecasterCost:
        """Count the embedding, every scan along time and across variates, and the head."""
        (length, dim), known = self.pos_embed.shape, cast(Iterable[Layer], self.layers)
        tokens = variates * length
        return ForecasterCost(
            tokens=tokens,
            patches=Cost.of_products(tokens * self.patch * dim),
            layers=tuple(
                total(
                    times(variates, mamba_cost(layer.token_mixer, dim, length, length)),
                    *(
                        times(length, mamba_cost(cast(Mamba, mixer), dim, variates, variates))
                        for mixer in layer.variate_mixers
                    ),
                )
                for layer in known
            ),
            head=Cost.of_products(tokens * dim * self.horizon),
        )


class TwoNorms(nn.Module):
    """Layer normalisation over the width of each token, then over the tokens of each channel."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.width, self.tokens = nn.LayerNorm(dim), nn.LayerNorm(length)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (..., length, dim)."""
        out: Tensor = self.tokens(self.width(x).mT).mT
        return out


class Average(nn.Module):
    """A weighted mean of tensors, uniform at the start.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return their mean, shaped like each of them."""
        weights = self.logits.softmax(dim=0)
        return torch.stack([w * x for w, x in zip(weights, outputs, strict=True)]).sum(dim=0)


class Layer(nn.Module):
    """A mixer of tokens and one of variates, each fed by the outputs of all before it.

    Args:
        dim: Width of a token.
        layer: Its number, from 0.
        drop: Dropout of both outputs.
        mix_variates: Whether there is a mixer of variates.
        state: Numbers of state per channel.
        expand: Inner width, in units of dim.
    """

    def __init__(
        self, dim: int, layer: int, *, drop: float, mix_variates: bool, state: int, expand: int
    ) -> None:
        super().__init__()
        self.token_of_tokens, self.token_of_variates = Average(layer + 1), Average(layer + 1)
        self.variate_of_tokens, self.variate_of_variates = Average(layer + 2), Average(layer + 1)

        def scan() -> Mamba:
            return Mamba(dim, bimamba_type="none", state=state, expand=expand)

        self.token_norm, self.token_mixer = nn.LayerNorm(dim), scan()
        self.variate_norm = nn.LayerNorm(dim)
        # Two whole mixers, one of which sees the variates in reverse.
        self.variate_mixers = nn.ModuleList(scan() for _ in range(2 * mix_variates))
        self.drop = Dropout(drop)

    def forward(self, tokens: list[Tensor], variates: list[Tensor]) -> None:
        """Append this layer's outputs to those before, each (batch, variates, tokens, dim).

        Args:
            tokens: The embedding and the outputs of mixers of tokens.
            variates: The embedding and the outputs of mixers of variates.
        """
        x = self.token_of_tokens(tokens) + self.token_of_variates(variates)
        tokens.append(x + self.drop(self._mix_tokens(self.token_norm(x))))
        x = self.variate_of_tokens(tokens) + self.variate_of_variates(variates)
        variates.append(x + self.drop(self._mix_variates(self.variate_norm(x))))

    def _mix_tokens(self, x: Tensor) -> Tensor:
        mixed = self.token_mixer(x.flatten(0, 1))  # (batch * variates, tokens, dim)
        out: Tensor = mixed.unflatten(0, x.shape[:2])
        return out

    def _mix_variates(self, x: Tensor) -> Tensor:
        if not self.variate_mixers:
            return torch.zeros_like(x)
        forward, backward = self.variate_mixers
        rows = rearrange(x, "b m t d -> (b t) m d")
        mixed: Tensor = forward(rows) + backward(rows.flip(1)).flip(1)
        return rearrange(mixed, "(b t) m d -> b m t d", t=x.shape[2])


tsm2 = register(TSM2, "tsm2")
