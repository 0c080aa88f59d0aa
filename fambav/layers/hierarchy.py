"""What hierarchical models are made of: blocks over maps, stages of them, convolutions of maps.

    map -> stage (blocks of one resolution) -> downsample -> map of half the sides -> ...

A map is (batch, height, width, dim), in memory too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fambav.layers.block import Hooks
from fambav.layers.cells import Cells
from fambav.layers.drop import DropPath
from fambav.layers.tokens import OUTPUT, Intermediates, Tokens

Mixed = Tensor | tuple[Tensor, Intermediates]
Result = TypeVar("Result", Tensor, Mixed)


class MapConv2d(nn.Conv2d):
    """A convolution of maps, with the weights of `nn.Conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve: (batch, height, width, in_channels) -> (batch, *smaller, out_channels)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Float32LayerNorm(nn.LayerNorm):
    """Normalise in float32, or float64 if x is, and leave the result there."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class Mlp(nn.Module):
    """Two linear maps with a GELU in between.

    Args:
        dim: Width of a cell.
        hidden: Width in between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map each cell by itself; the shape stays."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class MapBlock(nn.Module):
    """Residual branches over a map; a subclass makes them and its `forward` adds them up.

    Args:
        drop_path: Probability that a sample skips a branch.

    Attributes:
        grad_checkpointing: Compute branches again in the backward pass.
    """

    grad_checkpointing = False

    def __init__(self, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return x + drop_path(branch(x)).

        Randomness is drawn outside of what is computed twice, so that it is drawn once; a branch
        draws none.
        """
        out: Tensor = x + self.drop_path(self.computed(x, branch))
        return out

    def computed(self, x: Tensor, branch: Callable[[Tensor], Result]) -> Result:
        """Return branch(x), which is computed again in the backward pass if that is wanted."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(
                Result, checkpoint(branch, x, use_reentrant=False, preserve_rng_state=False)
            )
        return branch(x)


class ReducibleBlock(MapBlock):
    """A block whose mixer also takes kept cells alone, so that a reduction can shorten its map.

    x = leading(x)      x = x + drop_path(mixer(norm(x)))      x = trailing(x)
    """

    def leading(self, x: Tensor, cells: Cells | None = None) -> Tensor:
        """Return what the mixer's branch starts from; on kept cells, (batch, kept, dim), too."""
        del cells
        return x

    @abstractmethod
    def normed(self, x: Tensor) -> Tensor:
        """Normalise what the mixer reads."""

    @abstractmethod
    def mixed(
        self, x: Tensor, cells: Cells | None = None, want: frozenset[str] = frozenset()
    ) -> Mixed:
        """Mix a normalised map, or kept cells of it; also return what is wanted, if anything is.

        Args:
            x: (batch, height, width, dim), or (batch, kept, dim).
            cells: Where kept cells are.
            want: Fields of `Intermediates` but "mixed".
        """

    @abstractmethod
    def trailing(self, x: Tensor, cells: Cells | None = None) -> Tensor:
        """Add the branches behind the mixer's."""

    def forward(
        self, x: Tensor | Tokens, hooks: Hooks | None = None, cells: Cells | None = None
    ) -> Tensor | tuple[Tokens, Cells]:
        """Add all branches to a map, (batch, height, width, dim), or to cells, see `reduced`."""
        if hooks is not None:
            return self.reduced(cast(Tokens, x), hooks, cast(Cells, cells))
        x = cast(Tensor, x)
        x = self.residual(self.leading(x), lambda x: cast(Tensor, self.mixed(self.normed(x))))
        return self.trailing(x)

    def reduced(self, tokens: Tokens, hooks: Hooks, cells: Cells) -> tuple[Tokens, Cells]:
        """Do the same on the kept cells of a map.

        Args:
            tokens: The cells, their residual stream as x.
            hooks: Take cells away: before the block, between norm and mixer, where x is normalised
                and the stream is the residual, or after the mixer, where x is its output.
            cells: Where the cells are.

        Returns:
            The cells that are kept behind it, and where they are.
        """
        tokens, cells = cells.reduced(hooks.before, tokens, tokens.x)
        x = self.leading(tokens.x, cells)
        tokens = tokens._replace(x=self.normed(x), residual=x)
        tokens, cells = cells.reduced(hooks.between, tokens, x)
        want = hooks.want - OUTPUT
        made = self.computed(tokens.x, partial(self.mixed, cells=cells, want=want))
        y, state = made if isinstance(made, tuple) else (made, Intermediates())
        known = state._replace(mixed=y) if hooks.want else None
        y = self.drop_path(y)
        x = cast(Tensor, tokens.residual) + y
        tokens = tokens._replace(x=y, intermediates=known)
        tokens, cells = cells.reduced(hooks.after, tokens, x)
        x = self.trailing(cast(Tensor, tokens.residual) + tokens.x, cells)
        return tokens._replace(x=x, residual=None), cells


class Blocks(nn.ModuleList):
    """The blocks of a stage in a row, under the names 0, 1, ... of published weights."""

    def __init__(self, blocks: Sequence[MapBlock]) -> None:
        super().__init__(blocks)

    def forward(self, x: Tensor, hooks: Callable[[int], Hooks] | None = None) -> Tensor:
        """Run all blocks on a map, whose shape stays.

        Args:
            x: (batch, height, width, dim).
            hooks: Of each block, from 0, if cells go on the way; all are `ReducibleBlock` then.

        Returns:
            The whole map: members of a merged cell have its row, dropped cells what the residual
            stream held when they were dropped.
        """
        if hooks is None:
            for block in self:
                x = block(x)
            return x
        grid = (x.shape[1], x.shape[2])
        tokens = Tokens.start(x.flatten(1, 2), cls_index=(), grid=grid, trace=True)
        cells = Cells(tokens)
        for number, block in enumerate(self):
            tokens, cells = block(tokens, hooks(number), cells)
        out: Tensor = cells.whole(tokens.x).unflatten(1, grid)
        return out

    def set_grad_checkpointing(self, enable: bool) -> None:  # noqa: FBT001  as timm's
        """Keep only maps between branches for the backward pass, or everything."""
        for block in cast(Iterable[MapBlock], self):
            block.grad_checkpointing = enable


@contextmanager
def changed_hooks(
    stages: Sequence[Blocks], change: Callable[[int, int, Hooks], Hooks]
) -> Iterator[None]:
    """Change what the blocks of stages do, as long as this context is open.

    Args:
        stages: All of their blocks are `ReducibleBlock`.
        change: Gets a stage and a block in it, both from 0, and the block's hooks; returns others.
    """

    def instead(stage: int, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, own = given if len(given) == 2 else (*given, lambda block: Hooks())
        return x, lambda block: change(stage, block, own(block))

    with ExitStack() as handles:
        for stage, blocks in enumerate(stages):
            handles.callback(blocks.register_forward_pre_hook(partial(instead, stage)).remove)
        yield


class Stage(nn.Module):
    """Blocks at one resolution, and what leads to the next one.

    Args:
        blocks: In their order, or a `Blocks` that runs them in another way.
        downsample: From a map to the one of the next stage; None in the last stage.
    """

    def __init__(
        self, blocks: Sequence[MapBlock] | Blocks, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.blocks = blocks if isinstance(blocks, Blocks) else Blocks(blocks)
        self.downsample = nn.Identity() if downsample is None else downsample

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, without what leads to the next stage."""
        out: Tensor = self.blocks(x)
        return out


class PatchMerging(nn.Module):
    """Halve the sides of a map: the four cells of a square become one.

    A map of odd sides gets zeros below and to the right.

    Args:
        dim: Width of a cell.
        out: Width of a cell of the result.

    Source: Liu et al., "Swin Transformer", arXiv:2103.14030, section 3.1.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        # Names and order are those of published weights.
        self.reduction = nn.Linear(4 * dim, out, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Merge: (batch, height, width, dim) -> (batch, height / 2, width / 2, out), rounded up."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # Of a square, first the left cell of the upper row, then of the lower one, then the right.
        x = rearrange(x, "b (h down) (w right) c -> b h w (right down c)", down=2, right=2)
        out: Tensor = self.reduction(self.norm(x))
        return out


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the rates of each stage's blocks: linear from 0 in the first block to `rate`."""
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [
        [rate * (start + block) / last for block in range(depth)]
        for start, depth in zip(starts, depths, strict=True)
    ]


def trunc_normal_linear(module: nn.Module) -> None:
    """Draw a linear map as the published training of these models does; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
