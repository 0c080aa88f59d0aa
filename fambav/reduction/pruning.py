"""Drop tokens: the least important ones, or any.

Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", arXiv:2409.18962; Liang
et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", arXiv:2202.07800.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fambav.layers import BackboneInfo, Tokens
from fambav.layers.drop import uniform
from fambav.ops.match import Selection, others
from fambav.reduction.reducer import Places, Reducer, at_least, chosen
from fambav.reduction.scores import (
    importance,
    of_length_1,
    ranked,
    read_importance,
    rows,
    told,
)
from fambav.registry import REDUCERS

Number = TypeVar("Number", int, Tensor)

_BITS = 2**31 - 1


class _Pruner(Reducer):
    """Leaves one patch at least."""

    @staticmethod
    def limit(length: int, class_places: Places) -> int:
        """Return all patches but one."""
        return max(length - len(class_places) - 1, 0)


class _ByScore(_Pruner):
    """Leaves the patches that score best."""

    hook = "after"

    @classmethod
    def published(cls, info: BackboneInfo) -> str | None:
        """Return the lengths of the paper's Vim models of 224 x 224 pixels.

        Its schedules for PlainMamba are not known: what is returned there is ours, which comes to
        the paper's 8.4 G operations for PlainMamba-L3.
        """
        if info.family == "plainmamba" and info.depth in (24, 36):
            return "keep:0.7@5,11,17"
        if info.family == "vim" and (info.depth, info.tokens) == (24, 197):
            return {192: "tokens:157,125@10,20", 384: "tokens:157,125,101@5,10,15"}.get(info.width)
        return None

    @classmethod
    def presumed(cls, info: BackboneInfo) -> bool:
        """Return whether the model is a PlainMamba."""
        return info.family == "plainmamba"


@REDUCERS.register("prune-aligned")
class PruneAligned(_ByScore):
    """Drop the patches of least importance; the scan's state ages over them.

    The rest of the scan then sees each token as far from the one before it as it was.  Class tokens
    stay in every sample, whatever they score.  The released parameters of PlainMamba belong to the
    raster order and cannot be aligned: such a model takes the scan policy "compact".

    Args:
        signal, directions, clip: As in `importance`.

    Raises:
        ValueError: If an option has no such value.

    Source: Zhan et al., arXiv:2409.18962.  The schedules are those that its FLOPs lead to.  What is
    read of which direction is not told there; gated, both directions is our choice.
    """

    scan = "aligned"

    def __init__(
        self,
        *,
        signal: str = "gated",
        directions: str = "both",
        clip: bool = True,
    ) -> None:
        super().__init__()
        self.needs = read_importance(signal, directions)
        self.signal, self.directions, self.clip = signal, directions, clip

    def check(self, info: BackboneInfo) -> None:
        """Refuse to read a scan that there is not.

        Raises:
            ValueError: If that is asked.
        """
        if self.directions == "backward" and info.directions == 1:
            raise ValueError(
                "reduction option directions is 'backward', expected 'both' or 'forward' for mixers"
                " that scan one way"
            )

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Keep all but the `count` patches of the lowest score; of equal ones the later go."""
        score = importance(tokens, signal=self.signal, directions=self.directions, clip=self.clip)
        return _without(ranked(score, tokens.class_places)[:, -count:], score.shape[1])


@REDUCERS.register("evit")
class EViT(_ByScore):
    """Drop the patches of least score and scan what is left as if nothing had been between.

    The baseline that pruning with an aligned scan is compared with, at equal lengths.

    Args:
        score: "y", the importance of `prune-aligned`; "class", the cosine of a token's mixer output
            with that of the class token, the mean over them if there are more.
        fuse: Fold all patches of least score into the best of them, which stays, as a mean over the
            patches behind them.  One patch more belongs to them then, so that `count` go.

    Raises:
        ValueError: If an option has no such value.

    Source: Liang et al., arXiv:2202.07800, section 3, whose scores are attention weights; a fused
    token there is their weighted sum.
    """

    def __init__(self, *, score: str = "y", fuse: bool = False) -> None:
        super().__init__()
        self.score = chosen("score", score, ("y", "class"))
        self.fuse = fuse
        self.needs = frozenset({"y", "z"} if score == "y" else {"mixed"})

    def check(self, info: BackboneInfo) -> None:
        """Refuse to score by a class token that there is not.

        Raises:
            ValueError: If that is asked.
        """
        if self.score == "class" and not info.cls_index:
            raise ValueError(
                "reduction option score is 'class', expected 'y' for a model without class tokens"
            )

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Drop the `count` patches of the lowest score, or fold them into the next lowest."""
        score = importance(tokens) if self.score == "y" else _likeness(tokens)
        order, length = ranked(score, tokens.class_places), score.shape[1]
        gone = order[:, -count:]
        if not self.fuse:
            return _without(gone, length)
        fused = order[:, -count - 1 :][:, :1]
        return Selection(others(gone, length), gone, fused.expand(-1, count))


@REDUCERS.register("random")
class Random(_Pruner):
    """Drop or fold any patches, each as likely as another.

    In training every sample has a draw of its own, the same on any number of processes.  In
    evaluation there is one fixed draw for each length, the same for all samples, which neither
    reads nor moves a random generator.

    Args:
        mode: "prune" drops the patches; "merge" folds each into the patch nearest in the sequence
            that stays, of two the earlier, as a mean over the patches behind them.
        seed: Chooses the fixed draws, 0 or more.

    Raises:
        ValueError: If an option has no such value.
    """

    # Not "between": that part is computed twice where activations are checkpointed, and each time
    # would draw anew.
    hook = "before"
    hooks: ClassVar[tuple[str, ...]] = ("before", "after")

    def __init__(self, *, mode: str = "prune", seed: int = 0) -> None:
        super().__init__()
        self.mode = chosen("mode", mode, ("prune", "merge"))
        self.seed = at_least("seed", seed, 0)

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Choose `count` patches by lot."""
        length = tokens.x.shape[1]
        patches = others(tokens.class_places, length)
        if self.training:
            number = uniform(tokens.x, patches.shape[1])
        else:
            number = _fixed(patches, self.seed)
        gone = number.sort(dim=1, stable=True).indices[:, :count]
        source = patches.gather(1, gone)
        if self.mode == "prune":
            return _without(source, length)
        target = patches.gather(1, _nearest(gone, patches.shape[1]))
        return Selection(others(source, length), source, target)


def _without(gone: Tensor, length: int) -> Selection:
    nothing = gone[:, :0]
    return Selection(others(gone, length), nothing, nothing)


def _likeness(tokens: Tokens) -> Tensor:
    """Return how like the class token each token is, (batch, length)."""
    each = of_length_1(told(tokens, "mixed"))
    return (each @ rows(each, tokens.class_places).mT).mean(dim=2)


def _fixed(patches: Tensor, seed: int) -> Tensor:
    """Return a number for each patch that depends on nothing but how many there are.

    Made by arithmetic alone, since neither a compiler nor recorded kernels can seed a generator.
    """
    count = patches.shape[1]
    start = _scrambled(_scrambled(seed) + count)
    number = _scrambled(torch.arange(count, device=patches.device) + start)
    return number.expand_as(patches)


def _scrambled(number: Number) -> Number:
    """Map integers to integers of 31 bits, so that neighbours have nothing in common."""
    number = number & _BITS
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        number = ((number ^ (number >> shift)) * factor) & _BITS
    return number ^ (number >> 15)


def _nearest(gone: Tensor, length: int) -> Tensor:
    """Return which of 0 .. length-1 that is not `gone` is nearest to each of them."""
    left = others(gone, length)
    behind = torch.searchsorted(left, gone.contiguous())
    before = left.gather(1, (behind - 1).clamp(min=0))
    behind = left.gather(1, behind.clamp(max=left.shape[1] - 1))
    return torch.where((gone - before).abs() <= (behind - gone).abs(), before, behind)
