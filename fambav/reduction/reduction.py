"""A method at work in a model: where tokens go, how many, and how the scan goes on over them.

    method x schedule x point of a block x scan policy x class-token policy

All of them are fixed, and every length with them, before the first image.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from fambav.arguments import known_name, refusal
from fambav.layers import BackboneInfo, Hooks, Tokens
from fambav.reduction.apply import carried_dt, mask, merge, put_class_tokens
from fambav.reduction.lengths import Counts, Schedule
from fambav.reduction.reducer import Grid, Reducer
from fambav.reduction.schedule import make_schedule, write_schedule
from fambav.registry import CLASS_TOKEN_POLICIES, GAP_POLICIES, SCAN_POLICIES

_DELTA = frozenset({"delta"})


class Reduction(nn.Module):
    """Removes `schedule.counts[layer]` tokens at each layer.  Has no parameters.

    Args:
        info: The model.
        method: Chooses the tokens; None for none, with a schedule that removes none.
        schedule: Where and how many, checked.
        hook, scan, gap_policy, class_policy: Instead of the method's own, see `Reducer`.
        text: What the schedule was read from, for images of other sizes; its counts by default.
        depth: Layers of the model that the text is for, if those of `info` are its first.

    Raises:
        ValueError: If these do not go together, or the model cannot give what they need.
    """

    method: Reducer | None
    hook, scan, gap_policy, class_policy = "between", "compact", "none", "exact"
    needs: frozenset[str] = frozenset()
    remark: str | None = None

    def __init__(
        self,
        info: BackboneInfo,
        method: Reducer | None,
        schedule: Schedule,
        *,
        hook: str | None = None,
        scan: str | None = None,
        gap_policy: str | None = None,
        class_policy: str | None = None,
        text: str | None = None,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        self.info, self.method, self.schedule = info, method, schedule
        self._text = write_schedule(schedule.counts) if text is None else text
        self._depth, self._resized = depth or info.depth, dict[Grid, Reduction]()
        if method is None:
            self._hooks = [Hooks()] * info.depth
            return
        method.check(info)
        self.hook = known_name("reduction_hook", _or(hook, method.hook), method.hooks)
        self.scan = known_name("scan_policy", _or(scan, method.scan), SCAN_POLICIES)
        self.class_policy = _class_policy(info, method, class_policy)
        self.gap_policy = _gap_policy(method, self.scan, gap_policy)
        _check_class_tokens(info, self.scan, self.class_policy)
        _check_scan(info, method, self.scan)
        self.needs = method.needs | (_DELTA if self.gap_policy == "cached" else frozenset())
        _check_needs(info, method, self.needs, self._first_read())
        self._hooks = [self._hooks_of(layer) for layer in range(info.depth)]

    @classmethod
    def none(cls, info: BackboneInfo) -> Reduction:
        """Return one that removes nothing."""
        return cls(info, None, Schedule.of(info.tokens, (0,) * info.depth))

    def of_first_layers(self, info: BackboneInfo) -> Reduction:
        """Return what this does in a model that ends after its first `info.depth` layers."""
        return self._on(info, self.schedule.counts[: info.depth])

    def resized(self, info: BackboneInfo) -> Reduction:
        """Return what this does on images of another size: its schedule is read anew for them.

        Of "keep:0.7@5" the share stays, of "r:5" the number of tokens that go, of "tokens:99@5"
        that of tokens that are kept.

        Args:
            info: The model on such images.

        Raises:
            ValueError: If the schedule does not fit, as of `make_schedule`.
        """
        if self.method is None:
            return Reduction.none(info)
        if info.grid not in self._resized:
            whole = info._replace(stages=(info.stage._replace(depth=self._depth),))
            schedule = make_schedule(
                self._text, whole, self.method, hook=self.hook, class_policy=self.class_policy
            )
            self._resized[info.grid] = self._on(info, schedule.counts[: info.depth])
        return self._resized[info.grid]

    def _on(self, info: BackboneInfo, counts: Counts) -> Reduction:
        """Return what this does, with these counts, in a model of other sizes."""
        if not any(counts):
            return Reduction.none(info)
        made = Reduction(
            info,
            self.method,
            Schedule.of(info.tokens, counts, after=self.hook == "after"),
            hook=self.hook,
            scan=self.scan,
            gap_policy=self.gap_policy,
            class_policy=self.class_policy,
            text=self._text,
            depth=self._depth,
        )
        made.remark = self.remark
        return made

    @property
    def reduces(self) -> bool:
        """Whether there is a method at work, on images of any size."""
        return self.method is not None

    @property
    def name(self) -> str:
        """Name of the method, or "none"."""
        return "none" if self.method is None else self.method.name

    def hooks(self, layer: int) -> Hooks:
        """Return what the block `layer`, from 0, is to do."""
        return self._hooks[layer]

    def forward(self, tokens: Tokens, layer: int) -> Tokens:
        """Return `tokens` shorter by `schedule.counts[layer]`; layer counts from 0.

        Under the scan policy "masked" they keep their length, and tokens that go become zero.
        """
        count = self.schedule.counts[layer]
        if not count:
            return tokens
        method, kept = cast(Reducer, self.method), tokens.kept()
        selection = put_class_tokens(
            method.select(kept, count),
            kept.cls_index,
            self.class_policy,
            length=kept.position.shape[1],
        )
        plain = method.summed or not method.weighted
        weight = torch.ones_like(kept.size) if plain else kept.size
        fewer = merge(kept, selection, weight, summed=method.summed)
        if self.gap_policy == "cached":
            fewer = fewer._replace(skipped_dt=carried_dt(kept, selection.keep))
        if self.scan == "masked":
            return mask(tokens, fewer, selection.keep)
        return fewer._replace(grid=method.grid_after(kept.grid, count))

    def extra_repr(self) -> str:
        """Show the counts when a model is printed."""
        return f"counts={self.schedule.counts}"

    def summary(self) -> str:
        """Return in a few lines which tokens go where, as `fambav plan` prints it."""
        lines = [self.schedule.table()]
        if self.scan == "masked" and self.method is not None:
            lines.append(f"masked: every mixer runs on all {self.info.tokens} tokens")
        if self.remark is not None:
            lines.append(self.remark)
        return "\n".join(lines)

    def _first_read(self) -> int:
        """Return the first layer, from 0, whose mixer is read; -1 if none has run by then."""
        counts = self.schedule.counts
        first = next((n for n, count in enumerate(counts) if count), len(counts))
        return first if self.hook == "after" else first - 1

    def _hooks_of(self, layer: int) -> Hooks:
        counts, after = self.schedule.counts, self.hook == "after"
        found: dict[str, Any] = {}
        if counts[layer]:
            found[self.hook] = partial(self, layer=layer)
        reader = layer if after else layer + 1  # the layer that reads this layer's mixer
        reads = reader < len(counts) and counts[reader] > 0
        gone = any(counts[: layer if after else layer + 1])
        return Hooks(
            **found,
            want=self.needs if reads else frozenset(),
            gap_policy=self.gap_policy if gone and self.gap_policy != "none" else None,
            positions=gone and self.info.needs_positions,
        )


def _or(given: str | None, own: str) -> str:
    """Return what is given, whatever its truth, or a method's own."""
    return own if given is None else given


def _class_policy(info: BackboneInfo, method: Reducer, policy: str | None) -> str:
    """Return where class tokens go; where there are none, no method puts them anywhere."""
    own = method.class_policy if info.cls_index else "exact"
    return known_name("class_token_policy", _or(policy, own), CLASS_TOKEN_POLICIES)


def _gap_policy(method: Reducer, scan: str, policy: str | None) -> str:
    """Return how the state ages; "none" unless scans are aligned."""
    if scan != "aligned":
        if policy not in (None, "none"):
            raise refusal("gap_policy", policy, "none unless scan_policy is aligned")
        return "none"
    return known_name("gap_policy", _or(policy, method.gap_policy), GAP_POLICIES)


def _check_class_tokens(info: BackboneInfo, scan: str, policy: str) -> None:
    if policy == "exact":
        return
    expected = None
    if scan != "compact":
        expected = f"'exact' with scan_policy {scan}, which counts how far tokens are apart"
    elif policy == "middle" and info.cls_index != (info.tokens // 2,):
        expected = "'exact' or 'proportional' for a model without one class token in the middle"
    if not info.cls_index:
        expected = "'exact' for a model without class tokens"
    if expected:
        raise ValueError(f"class_token_policy is {policy!r}, expected {expected}")


def _check_scan(info: BackboneInfo, method: Reducer, scan: str) -> None:
    if scan == "compact":
        return
    if not method.ordered:
        raise ValueError(
            f"scan_policy is {scan!r}, expected 'compact' with {method.name}, which loses order"
        )
    if scan == "aligned" and info.unaligned:
        raise ValueError(f"scan_policy is 'aligned', expected another; {info.unaligned}")


def _check_needs(info: BackboneInfo, method: Reducer, needs: frozenset[str], first: int) -> None:
    missing, read = needs - info.intermediates, ", ".join(sorted(needs))
    if missing:
        able = ", ".join(sorted(info.intermediates)) or "nothing"
        where = f"s of stage {info.prefix.rstrip('.')}" if info.prefix else ""
        raise ValueError(
            f"reduction is {method.name!r}, which reads {read} of the mixer{where}, expected a"
            f" method or options that make do with {able}"
        )
    if needs and first < 0:
        raise ValueError(
            f"reduction is {method.name!r} at layer {info.prefix}1, expected a later layer or"
            f" reduction_hook after; it reads {read} of the mixer before"
        )
