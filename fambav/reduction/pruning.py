"""Remove the tokens that matter least, or any: dropped, folded into others, or some of each.

How much a token matters is read from the mixer before: its output, its scan or its step sizes.
"""

from __future__ import annotations

import math
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.arguments import is_number, refusal
from fambav.layers import BackboneInfo, Tokens
from fambav.layers.drop import uniform
from fambav.ops.cross_scan import select_rows
from fambav.ops.match import Selection, others
from fambav.reduction.reducer import OPTION, Indices, Reducer, at_least, one_of, switch
from fambav.registry import REDUCERS

Number = TypeVar("Number", int, Tensor)

_SIGNALS = ("gated", "ungated", "mixed")
_DIRECTIONS = {"both": slice(None), "forward": slice(0, None, 2), "backward": slice(1, None, 2)}
_BITS = 2**31 - 1


class _Pruner(Reducer):
    """Leaves one patch at least."""

    @staticmethod
    def limit(length: int, cls_index: Indices) -> int:
        """Return all patches but one."""
        return max(length - len(cls_index) - 1, 0)


class _ByScore(_Pruner):
    """Keeps the patches that score best."""

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

    Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", arXiv:2409.18962.
    The schedules are those that its FLOPs lead to.  It does not say what is read of which
    direction; gated, both directions is our choice.
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
        self.needs = _read_by_importance(signal, directions, clip=switch("clip", clip))
        self.signal, self.directions, self.clip = signal, directions, clip

    def check(self, info: BackboneInfo) -> None:
        """Refuse to read a scan that there is not.

        Raises:
            ValueError: If that is the option.
        """
        if self.directions == "backward" and info.directions == 1:
            raise ValueError(
                "reduction option directions is 'backward', expected 'both' or 'forward' for mixers"
                " that scan one way"
            )

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Keep all but the `count` patches of the lowest score; of equal ones the later go."""
        score = importance(tokens, signal=self.signal, directions=self.directions, clip=self.clip)
        return _without(ranked(score, tokens.cls_index)[:, -count:], score.shape[1])


@REDUCERS.register("evit")
class EViT(_ByScore):
    """Drop the patches of least score and scan the kept ones as if none had been between.

    The baseline that pruning with an aligned scan is compared with, at equal lengths.

    Args:
        score: "y", the importance of `prune-aligned`; "class", the cosine of a token's mixer output
            with that of the class token, the mean over them if there are more.
        signal: Of the importance, see `importance`.
        fuse: Fold all patches of least score into the best of them, which stays, as a mean over the
            patches behind them.  One patch more belongs to them then, so that `count` go.

    Raises:
        ValueError: If an option has no such value.

    Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via
    Token Reorganizations", arXiv:2202.07800, section 3, whose scores are attention weights; a fused
    token there is their weighted sum.
    """

    def __init__(self, *, score: str = "y", signal: str = "gated", fuse: bool = False) -> None:
        super().__init__()
        self.score = one_of("score", score, ("y", "class"))
        self.fuse, self.signal = switch("fuse", fuse), signal
        read = _read_by_importance(signal, "both", clip=True)
        if score == "class" and signal != "gated":
            raise refusal(f"{OPTION} signal", signal, "none with score=class, which reads no scan")
        self.needs = read if score == "y" else frozenset({"mixed"})

    def check(self, info: BackboneInfo) -> None:
        """Refuse to score by a class token that there is not.

        Raises:
            ValueError: If that is the option.
        """
        if self.score == "class" and not info.cls_index:
            raise ValueError(
                "reduction option score is 'class', expected 'y' for a model without class tokens"
            )

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Drop the `count` patches of the lowest score, or fold them into the next lowest."""
        if self.score == "y":
            score = importance(tokens, signal=self.signal)
        else:
            each = _of_length_1(tokens.intermediate("mixed"))
            # (batch, length, dim) @ (batch, dim, k) -> (batch, length)
            score = (each @ select_rows(each, tokens.cls_index).mT).mean(dim=2)
        order, length = ranked(score, tokens.cls_index), score.shape[1]
        gone = order[:, -count:]
        if not self.fuse:
            return _without(gone, length)
        fused = order[:, -count - 1 :][:, :1]
        return Selection(others(gone, length), gone, fused.expand(-1, count))


@REDUCERS.register("mtr")
class MTR(_Pruner):
    """Fold the patches of the smallest steps into the most alike of those of middling steps.

        step sizes -> kept | targets | sources, from the largest to the smallest

    A patch's score is its step size, the mean over channels summed over directions.  The `count`
    lowest are sources; those that score next are targets; the others are neither.  Each source
    joins the target most like it, by cosine, in a plain mean.  Order is kept.

    Args:
        targets: Targets for each source, 0.001 or more; their number is rounded up.  Where fewer
            patches are there than that, all of them are targets.

    Raises:
        ValueError: If targets is less.

    Source: "Training-free Token Reduction for Vision Mamba", arXiv:2507.14042, in which the sizes
    of the groups are not known to us.
    """

    hook = "after"
    weighted = False
    needs = frozenset({"delta"})

    def __init__(self, *, targets: float = 2.0) -> None:
        super().__init__()
        if not is_number(targets) or not 1e-3 <= targets < math.inf:
            raise refusal(f"{OPTION} targets", targets, "0.001 or more")
        self.targets = targets

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Fold the `count` patches of the smallest steps."""
        delta = tokens.intermediate("delta").detach()  # (batch, directions, length, inner)
        wide = torch.promote_types(delta.dtype, torch.float32)
        order = ranked(delta.mean(dim=-1, dtype=wide).sum(dim=1), tokens.cls_index)
        source = order[:, -count:]
        targets = math.ceil(round(count * self.targets, 6))
        middle = order[:, :-count][:, -targets:]
        _, target = most_alike(tokens.x, source, middle)
        return Selection(others(source, tokens.x.shape[1]), source, target)


@REDUCERS.register("utrc")
class UTRC(Reducer):
    """Link the less important half of the patches to the rest, and fold the strongest links.

        patches -> less important half -> most like one of the other half -> the strongest links
        x:      of the linked, some are pruned, the others merged      residual: all are merged

    All patches are ranked by importance.  The lower half, rounded down, is the paper's set A, the
    rest its set B.  Each a in A is linked to the b in B that is most like it, by cosine; the
    `count` most alike links are carried out, and their a go.  A share of these, those of least
    importance, is pruned: x does without them.  The others are merged: b becomes the plain mean of
    itself and all that joined it, (a + b) / 2 for one.  In the residual all of them are merged.

    Args:
        prune_share: Pruned of those that go, 0 to 1; their number is rounded, halves down.
        signal: As in `importance`; the paper's is that of the mixer's output.

    Raises:
        ValueError: If an option has no such value.

    Source: Zhan et al., "Rethinking Token Reduction for State Space Models", arXiv:2410.14725, for
    language models, which have no class token; here one is in neither set.  It does not say which
    of the linked tokens are pruned, which is our choice.
    """

    hook = "after"
    weighted = False

    def __init__(self, *, prune_share: float = 0.5, signal: str = "mixed") -> None:
        super().__init__()
        if not is_number(prune_share) or not 0 <= prune_share <= 1:
            raise refusal(f"{OPTION} prune_share", prune_share, "0 to 1")
        self.needs = _read_by_importance(signal, "both", clip=True)
        self.prune_share, self.signal = prune_share, signal

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Fold the `count` strongest links."""
        score = importance(tokens, signal=self.signal)
        order = ranked(score, tokens.cls_index)
        rest, lower = order.tensor_split([order.shape[1] - order.shape[1] // 2], dim=1)
        lower = lower.sort(dim=1).values  # so that of equal links the lower index wins
        cosine, partner = most_alike(tokens.x, lower, rest)
        links = cosine.sort(dim=1, descending=True, stable=True).indices[:, :count]
        source, target = lower.gather(1, links), partner.gather(1, links)
        silent = self._pruned(score.gather(1, source))
        return Selection(others(source, score.shape[1]), source, target, silent)

    def _pruned(self, score: Tensor) -> Tensor:
        """Mark those of least score, (batch, count), bool."""
        pruned = math.ceil(score.shape[1] * self.prune_share - 0.5)
        least = score.sort(dim=1, stable=True).indices[:, :pruned]
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, least, value=True)

    @staticmethod
    def limit(length: int, cls_index: Indices) -> int:
        """Return half of the patches, rounded down."""
        return (length - len(cls_index)) // 2


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
        self.mode = one_of("mode", mode, ("prune", "merge"))
        self.seed = at_least("seed", seed, 0)

    def select(self, tokens: Tokens, count: int) -> Selection:
        """Choose `count` patches by lot."""
        length = tokens.x.shape[1]
        patches = others(tokens.cls_index, length)
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


def importance(
    tokens: Tokens, *, signal: str = "gated", directions: str = "both", clip: bool = True
) -> Tensor:
    """Sum what the last mixer gave of each token over channels and directions.

    score[j] = sum over directions and channels of max(0, y[j]), each y in the order of the tokens

    Args:
        tokens: With the intermediate that has the sum over channels, or "mixed".
        signal: y is "gated", the scan's output times the gate; "ungated", the scan's output alone;
            "mixed", the output of the mixer.
        directions: "both", or the scans that run "forward" or "backward" alone.
        clip: Leave negative numbers out.

    Returns:
        (batch, length), float32 (float64 if the intermediates are), without a gradient.

    Raises:
        ValueError: If the intermediates are not there.

    Source: Zhan et al., arXiv:2409.18962, token importance evaluation.
    """
    if signal == "mixed":
        y = _upcast(tokens.intermediate("mixed"))  # (batch, length, dim)
        return (y.clamp(min=0) if clip else y).sum(dim=-1)
    score = tokens.intermediate(_score(signal, clip=clip))  # (batch, directions, length, 1)
    return score[:, _DIRECTIONS[directions], :, 0].sum(dim=1)


def _score(signal: str, *, clip: bool) -> str:
    """Return the intermediate that `importance` reads."""
    return signal if clip or signal == "mixed" else f"{signal}_unclipped"


def _read_by_importance(signal: str, directions: str, *, clip: bool) -> frozenset[str]:
    """Return the intermediates that `importance` reads with these options, or refuse them."""
    one_of("signal", signal, _SIGNALS)
    one_of("directions", directions, tuple(_DIRECTIONS))
    if signal == "mixed" and directions != "both":
        raise ValueError(
            f"reduction option directions is {directions!r}, expected 'both' with signal=mixed, in"
            " which the directions are one sum"
        )
    return frozenset({_score(signal, clip=clip)})


def ranked(score: Tensor, cls_index: Tensor) -> Tensor:
    """Return the indices of the patches by score, the highest first.

    Of equal scores the lower index comes first.  Class tokens are in no rank, whatever they score.

    Args:
        score: (batch, length).
        cls_index: (batch, k), int64.

    Returns:
        (batch, length - k), int64.
    """
    patches = others(cls_index, score.shape[1])
    order = score.gather(1, patches).sort(dim=1, descending=True, stable=True).indices
    return patches.gather(1, order)


def most_alike(x: Tensor, index: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Find for some tokens which of some others is most like each, by cosine.

    Compared in float64, which no setting of a product's precision touches.  Of equally like ones
    the lower index wins.  A token of zeros is equally unlike all.

    Args:
        x: Features, (batch, length, dim).
        index: Tokens to find one for, (batch, n), int64.
        among: Tokens it may be, (batch, m >= 1), int64.

    Returns:
        The cosines, (batch, n), float64, and the indices found, (batch, n), int64.
    """
    among = among.sort(dim=1).values
    mine, theirs = (_of_length_1(select_rows(x, some)) for some in (index, among))
    cosine, best = (mine @ theirs.mT).max(dim=2)  # of (batch, n, m)
    return cosine, among.gather(1, best)


def _of_length_1(x: Tensor) -> Tensor:
    """Scale features to length 1, in float64 and without a gradient; zeros stay."""
    return F.normalize(x.detach().double(), dim=-1, eps=1e-30)


def _upcast(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _without(gone: Tensor, length: int) -> Selection:
    nothing = gone[:, :0]
    return Selection(others(gone, length), nothing, nothing)


def _fixed(patches: Tensor, seed: int) -> Tensor:
    """Return a number for each patch that depends on nothing but how many there are.

    Made by arithmetic alone, since neither a compiler nor a CUDA graph can seed a generator.
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
    kept = others(gone, length)
    behind = torch.searchsorted(kept, gone.contiguous())
    before = kept.gather(1, (behind - 1).clamp(min=0))
    behind = kept.gather(1, behind.clamp(max=kept.shape[1] - 1))
    return torch.where((gone - before).abs() <= (behind - gone).abs(), before, behind)
