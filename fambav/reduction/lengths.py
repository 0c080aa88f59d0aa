"""How many tokens there are at each layer: data, without what removes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

Counts = tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """How many tokens there are at each layer.

    Attributes:
        start: Tokens before the first layer, class tokens included.
        counts: Tokens removed at each layer.
        lengths: Tokens that each layer's mixer sees.
        after: Whether a layer's tokens go after its mixer instead of before it.
    """

    start: int
    counts: Counts
    lengths: tuple[int, ...]
    after: bool = False

    @classmethod
    def of(cls, start: int, counts: Counts, *, after: bool = False) -> Schedule:
        """Work out the lengths."""
        kept = [start - sum(counts[: number + 1]) for number in range(len(counts))]
        seen = [n + count for n, count in zip(kept, counts, strict=True)] if after else kept
        return cls(start, counts, tuple(seen), after)

    @property
    def final(self) -> int:
        """Tokens behind the last layer."""
        return self.start - self.removed

    @property
    def removed(self) -> int:
        """Tokens removed by all layers together."""
        return sum(self.counts)

    @property
    def share(self) -> float:
        """Tokens summed over the mixers, as a share of what they are without removal, 0 to 1."""
        return sum(self.lengths) / self.unreduced

    @property
    def unreduced(self) -> int:
        """Tokens summed over the mixers without removal."""
        return len(self.lengths) * self.start

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each layer."""
        return tuple(str(number) for number in range(1, len(self.counts) + 1))

    @property
    def _of(self) -> str:
        return str(self.start)

    def table(self) -> str:
        """Return the schedule as text; neighbouring layers that remove nothing share a line."""
        lines = [f"{'layer':>7}  {'tokens in':>9}  {'removed':>7}  {'tokens out':>10}"]
        layers = zip(self.names, self.counts, self.lengths, strict=True)
        for (_, count, seen), run in groupby(layers, key=_equal):
            first, *rest = (name for name, *_ in run)
            name = f"{first}-{rest[-1]}" if rest else first
            out = seen - count if self.after else seen
            lines.append(f"{name:>7}  {out + count:>9}  {count or '-':>7}  {out:>10}")
        point = ", after the mixer of their layer" if self.after else ""
        return "\n".join(
            (
                *lines,
                f"total removed: {self.removed} of {self._of} tokens{point}",
                f"share of token-layers left: {100 * self.share:.1f}% "
                f"({sum(self.lengths)} of {self.unreduced})",
            )
        )


@dataclass(frozen=True)
class StagedSchedule(Schedule):
    """The same of a model of stages, each of which starts with all of its tokens.

    Attributes:
        depths: Layers of each stage.
        starts: Tokens before the first layer of each.
    """

    depths: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()

    @classmethod
    def joined(cls, stages: Sequence[Schedule]) -> StagedSchedule:
        """Join the schedules of the stages."""
        return cls(
            start=stages[0].start,
            counts=tuple(chain.from_iterable(stage.counts for stage in stages)),
            lengths=tuple(chain.from_iterable(stage.lengths for stage in stages)),
            after=any(stage.after for stage in stages),
            depths=tuple(len(stage.counts) for stage in stages),
            starts=tuple(stage.start for stage in stages),
        )

    @property
    def final(self) -> int:
        """Tokens behind the last stage, which are all of its tokens again."""
        return self.starts[-1]

    @property
    def unreduced(self) -> int:
        """Tokens summed over the mixers without removal."""
        return sum(depth * start for depth, start in zip(self.depths, self.starts, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each layer, stage.layer."""
        stages = enumerate(self.depths, start=1)
        return tuple(f"{stage}.{n}" for stage, depth in stages for n in range(1, depth + 1))

    @property
    def _of(self) -> str:
        return " + ".join(map(str, self.starts))


def _equal(layer: tuple[str, int, int]) -> tuple[str, int, int]:
    """Return what is the same of layers that share a line: stage, count and length."""
    name, count, seen = layer
    return name.rpartition(".")[0], count, seen
