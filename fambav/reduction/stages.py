"""A method at work in a model of stages: within each, and never from one to the next.

stage: layers that remove tokens -> unmerged to its whole map -> downsample -> next stage
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, cast

from torch import nn

from fambav.arguments import refusal
from fambav.layers import BackboneInfo
from fambav.reduction.lengths import Schedule, StagedSchedule
from fambav.reduction.limits import check_counts
from fambav.reduction.reducer import Reducer
from fambav.reduction.reduction import Reduction
from fambav.reduction.schedule import NAME, PUBLISHED, parse_schedule, write_schedule


class StagedReduction(nn.Module):
    """A reduction of each stage, all by one method.  Has no parameters.

    Args:
        info: The model.
        text: The schedule, whose layers are named stage.layer; "" for none.
        method: Chooses the tokens; None for none.
        given: Name and value of the setting that a refusal is about, if text is made from it.
        policies: `hook`, `scan`, `gap_policy` and `class_policy` of `Reduction`.

    Attributes:
        stages: The reductions, each of a model of that stage alone.

    Raises:
        ValueError: As `make_schedule` and `Reduction`, or if the scan policy is not "compact".
    """

    def __init__(
        self,
        info: BackboneInfo,
        method: Reducer | None = None,
        text: str = "",
        *,
        given: tuple[str, object] | None = None,
        **policies: Any,
    ) -> None:
        super().__init__()
        self.info, self.method = info, method
        self._text, self._policies = text, policies
        self._resized = dict[tuple[Any, ...], StagedReduction]()
        depths = [stage.depth for stage in info.stages]
        counts = (0,) * sum(depths)
        if method is not None:
            counts = self._counts(method, given)
        ends = [0, *accumulate(depths)]
        self.stages = nn.ModuleList(
            self._stage(number, counts[start:end], given)
            for number, (start, end) in enumerate(pairwise(ends))
        )

    def _counts(self, method: Reducer, given: tuple[str, object] | None) -> tuple[int, ...]:
        """Read the schedule, and refuse what means nothing for a model of stages."""
        name, value = given or (NAME, self._text)
        if self._text == PUBLISHED:
            expected = "another such as r:5@2.1-2.2"
            more = f"no paper has one for {self.info.family} whose stages are unmerged"
            raise refusal(name, value, f"{expected}; {more}")
        scan = self._policies.get("scan") or method.scan
        if scan == "masked":
            why = "between layers of a stage, tokens that went are no part of its map"
            raise refusal("scan_policy", scan, f"'compact' with {self.info.family}; {why}")
        if method.summed:
            why = "each member of a group gets its row back at the end of the stage"
            raise refusal("reduction option merge", "sum", f"'mean' in models of stages; {why}")
        return parse_schedule(self._text, self.info, name=name)

    def _stage(
        self, number: int, counts: tuple[int, ...], given: tuple[str, object] | None
    ) -> Reduction:
        info, method = self.info.of_stage(number), self.method
        if method is None or not any(counts):
            return Reduction.none(info)
        policy = self._policies.get("class_policy")
        check_counts(counts, info, method, policy, given=given or (NAME, self._text))
        after = (self._policies.get("hook") or method.hook) == "after"
        schedule = Schedule.of(info.tokens, counts, after=after)
        return Reduction(info, method, schedule, **self._policies)

    def stage(self, number: int) -> Reduction:
        """Return the reduction of a stage, from 0."""
        return cast(Reduction, self.stages[number])

    def resized(self, info: BackboneInfo) -> StagedReduction:
        """Return what this does on images of another size, as `Reduction.resized`."""
        key = tuple(stage.grid for stage in info.stages)
        if key not in self._resized:
            made = StagedReduction(info, self.method, self._text, **self._policies)
            self._resized[key] = made.train(self.training)
        return self._resized[key]

    def of_first_stages(self, info: BackboneInfo) -> StagedReduction:
        """Return what this does in a model that ends after its first stages.

        On images of another size, as many tokens go there as on these.
        """
        schedule = StagedSchedule.joined([self.stage(n).schedule for n in range(len(info.stages))])
        text = write_schedule(schedule.counts, schedule.names)
        if not text:
            return StagedReduction(info)
        return StagedReduction(info, self.method, text, **self._policies)

    @property
    def schedule(self) -> StagedSchedule:
        """Tokens removed by and kept at each layer."""
        return StagedSchedule.joined([self.stage(n).schedule for n in range(len(self.stages))])

    @property
    def reduces(self) -> bool:
        """Whether there is a method at work."""
        return self.method is not None

    @property
    def name(self) -> str:
        """Name of the method, or "none"."""
        return "none" if self.method is None else self.method.name

    @property
    def scan(self) -> str:
        """The scan policy."""
        return "compact"

    def extra_repr(self) -> str:
        """Show the counts when a model is printed."""
        return f"counts={self.schedule.counts}"

    def summary(self) -> str:
        """Return in a few lines which tokens go where, as `fambav plan` prints it."""
        behind = ["behind each stage, its map is whole again"] * self.reduces
        return "\n".join((self.schedule.table(), *behind))
