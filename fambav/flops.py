"""What an image or a forecast costs, by arithmetic on sizes: no weights, no forward pass.

    config or model -> parts -> a cost for each part in three conventions -> table, JSON, Markdown

The formulas and conventions are in `fambav.models.flops`.  A method of reduction is counted once
`OVERHEADS` has a formula of its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

import torch
from torch import nn

from fambav import training
from fambav.config import Config
from fambav.heads import Detector, SegmentationModel
from fambav.models import Backbone, Forecaster, Hierarchical
from fambav.models.flops import (
    CONVENTIONS,
    FREE,
    OVERHEADS,
    Cost,
    ModelCost,
    Overhead,
    alignment,
    carrying,
    total,
)
from fambav.reduction import Reducer, Reduction, StagedReduction
from fambav.registry import DATA_SETS, FOREIGN
from fambav.table import Table, json_document

__all__ = ["CLASSES", "CONVENTIONS", "OVERHEADS", "Cost", "Overhead", "count", "count_config"]

# Of data sets whose classes are known without reading them.
CLASSES = {
    "DIGITS": 10,
    "SHAPES100": 100,
    "CIFAR": 100,
    "CIFAR10": 10,
    "IMNET": 1000,
    "FAKE": 1000,
    "SHAPES-SEG": 11,
    "SHAPES-DET": 10,
    "VAIHINGEN": 6,
    "POTSDAM": 6,
    "ADE20K": 150,
    "COCO": 80,
}
VARIATES = {"WAVES": 3, "ETTh1": 7, "ETTh2": 7, "ETTm1": 7, "ETTm2": 7}  # of series, likewise


@dataclass(frozen=True, kw_only=True)
class Row:
    """One part of a model.

    Attributes:
        part: "patches", "layer", "downsample", "upsample" or "head".
        layer: Number of the layer, from 1; None for the other parts.
        name: Its name in schedules.
        tokens: Tokens that the part works on; of a layer, those that its mixer sees.
        removed: Tokens removed at this layer.
        own: Cost of the part by itself.
        alignment: Cost of scanning as if removed tokens were still there.
        reduction: Cost of choosing and removing tokens.
    """

    part: str
    layer: int | None = None
    name: str | None = None
    tokens: int
    removed: int = 0
    own: Cost
    alignment: Cost = FREE
    reduction: Cost = FREE


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one image costs, or one forecast.

    Attributes:
        model: Name of the model.
        input_size: Height and width of an image, in pixels; or lookback and variates of a forecast.
        num_classes: Length of the output.
        forecast: Whether that is a forecast.
        method: Name of the method of reduction; None if no tokens are removed.
        scan: The scan policy; None if no tokens are removed.
        counted: Whether the method has a formula in `OVERHEADS`; without one it counts nothing.
        start: Tokens before the first layer, class tokens included.
        rows: The parts, in the order in which an image meets them.
        unreduced: Cost of the model without reduction.
    """

    model: str
    input_size: tuple[int, int]
    num_classes: int
    forecast: bool = False
    method: str | None
    scan: str | None
    counted: bool = True
    start: int
    rows: tuple[Row, ...]
    unreduced: Cost

    @property
    def reduction(self) -> Cost:
        """Cost of choosing and removing tokens, over all layers."""
        return total(*(row.reduction for row in self.rows))

    @property
    def alignment(self) -> Cost:
        """Cost of scanning as if removed tokens were still there, over all layers."""
        return total(*(row.alignment for row in self.rows))

    @property
    def total(self) -> Cost:
        """Cost of everything."""
        return total(*(row.own for row in self.rows), self.reduction, self.alignment)

    def table(self) -> Table:
        """Return the parts as a table; neighbouring layers that are equal share a line."""
        unit, size = ("G (1e9)", 1e9) if self.unreduced.literature >= 1e9 else ("M (1e6)", 1e6)

        def line(part: str, cost: Cost, tokens: str = "", removed: str = "") -> Sequence[str]:
            return part, tokens, removed, *(f"{number / size:.4f}" for number in cost)

        lines = []
        for (_, tokens, removed), run in groupby(
            self.rows, key=lambda row: (row.part, row.tokens, row.removed)
        ):
            rows = list(run)
            cost = total(*(row.own for row in rows))
            lines.append(line(_span(rows), cost, str(tokens), str(removed or "-")))
        head = lines.pop()
        if self.method:
            lines.append(line("reduction", self.reduction))
        if any(self.alignment):
            lines.append(line("alignment", self.alignment))
        lines += [head, line("total", self.total)]
        if self.method:
            spent = total(self.reduction, self.alignment)
            lines += [
                line("without reduction", self.unreduced),
                ("share left", "", "", *_shares(self.total, self.unreduced)),
                ("spent on reduction", "", "", *_shares(spent, self.total)),
            ]
        what = "forecast" if self.forecast else "image"
        note = f"in {unit} operations for one {what}; a line of several layers is their sum"
        if not self.counted:
            note += f"; what choosing costs {self.method} is not known, and not counted"
        return Table(
            head=("part", "tokens", "removed", *CONVENTIONS),
            rows=lines,
            names=1,
            title=self._title(),
            notes=[note, *(f"{name}: {meaning}" for name, meaning in CONVENTIONS.items())],
        )

    def _title(self) -> str:
        (height, width), removed = self.input_size, sum(row.removed for row in self.rows)
        how = f"{self.method} removes {removed}, {self.scan} scan" if self.method else "none go"
        sizes = f"{height} x {width} pixels, {self.num_classes} classes"
        if self.forecast:
            sizes = f"{height} rows of {width} variates, {self.num_classes} rows ahead"
        return f"{self.model}, {sizes}: {self.start} tokens, {how}"

    def json(self) -> str:
        """Return everything as JSON, counts as whole numbers under the conventions' names."""
        sizes = ("model", "input_size", "num_classes", "forecast")
        figures = {
            **{n: getattr(self, n) for n in (*sizes, "method", "scan", "counted", "start")},
            "unreduced": self.unreduced.as_dict(),
            **{n: getattr(self, n).as_dict() for n in ("reduction", "alignment", "total")},
            "conventions": CONVENTIONS,
        }
        each = (
            {k: v.as_dict() if isinstance(v, Cost) else v for k, v in vars(row).items()}
            for row in self.rows
        )
        return json_document(figures, rows=list(each))


def _span(rows: list[Row]) -> str:
    """Name neighbouring parts of one kind."""
    first, last = rows[0], rows[-1]
    if first.layer is None:
        return first.part
    return f"layer {first.name}" if last is first else f"layers {first.name}-{last.name}"


def _shares(part: Cost, whole: Cost) -> tuple[str, ...]:
    """Return each convention's share in percent."""
    return tuple(f"{100 * a / b:.1f}%" for a, b in zip(part, whole, strict=True))


def count_config(config: Config) -> Report:
    """Count what an image costs the model of a configuration, or a forecast, without its data.

    Args:
        config: The settings; without `num_classes` the head has the classes of the data set.

    Raises:
        ValueError: If the model is not one of ours, cannot be built, or the number of classes or
            variates is known only to the data's files.
    """
    name, data_set, classes = config.model.model, config.data.data_set, config.model.num_classes
    forecast = DATA_SETS[data_set] == "forecasting"
    if name.startswith(FOREIGN):
        raise ValueError(f"model is {name!r}, expected one of `fambav list models`")
    if forecast:
        classes = config.model.horizon
        if data_set not in VARIATES:
            known = ", ".join(VARIATES)
            raise ValueError(f"data_set is {data_set!r}, expected one of known variates: {known}")
    elif classes is None:
        classes = CLASSES.get(data_set)
    if classes is None:
        raise ValueError(
            f"num_classes is None, expected a number with data_set {data_set}, whose"
            " classes only its files tell"
        )
    with torch.device("meta"):
        model = training.model(config, num_classes=classes)
    if isinstance(model, Forecaster):
        model.pretrained_cfg["input_size"] = (model.lookback, VARIATES[data_set])
    return count(model)


def count(model: nn.Module, reduction: Reduction | StagedReduction | None = None) -> Report:
    """Count what an image costs a model at the lengths of its schedule, or what a forecast does.

    Args:
        model: One of ours; weights may be on the meta device.  The `pretrained_cfg` of a forecaster
            has the number of variates.
        reduction: Instead of the model's own.

    Raises:
        ValueError: If the model is not one of ours.
    """
    if isinstance(model, Detector):
        wanted = "one whose head does as much for every image"
        raise ValueError(f"model is a detector with head {model.head}, expected {wanted}")
    if isinstance(model, SegmentationModel):
        return _headed(model, reduction)
    if isinstance(model, Hierarchical):
        own = model.reduction if model.reducible else None
        return _staged(model, cast("StagedReduction | None", reduction or own))
    if isinstance(model, Forecaster):
        return _forecast(model)
    if not isinstance(model, Backbone):
        raise ValueError(f"model is a {type(model).__name__}, expected one of `fambav list models`")
    return _reduced(model, cast(Reduction, reduction or model.reduction))


def _reduced(model: Backbone, reduction: Reduction) -> Report:
    """Count a model of one sequence of tokens."""
    cost, info, cells = model.flop_parts(), model.info, math.prod(model.info.grid)
    name = reduction.name if reduction.schedule.removed else None
    full = [layer(info.tokens, cells) for layer in cost.layers]
    return Report(
        model=model.pretrained_cfg.get("architecture", type(model).__name__),
        input_size=model.img_size,
        num_classes=model.num_classes,
        method=name,
        scan=None if name is None else reduction.scan,
        counted=name is None or name in OVERHEADS.names(),
        start=info.tokens,
        rows=(
            Row(part="patches", tokens=cells, own=cost.patches),
            *_layer_rows(cost, reduction),
            Row(part="head", tokens=1, own=cost.head),
        ),
        unreduced=total(cost.patches, *full, cost.head),
    )


def _headed(model: SegmentationModel, reduction: Reduction | StagedReduction | None) -> Report:
    """Count a backbone with a head that labels pixels in the place of its own."""
    head, body = model.head_cost(), count(model.backbone, reduction)
    *rows, own = body.rows
    unreduced = (a - b + c for a, b, c in zip(body.unreduced, own.own, head, strict=True))
    return replace(
        body,
        num_classes=model.num_classes,
        rows=(*rows, Row(part="head", tokens=1, own=head)),
        unreduced=Cost(*unreduced),
    )


def _forecast(model: Forecaster) -> Report:
    """Count a forecast."""
    rows, variates = [], int(model.pretrained_cfg["input_size"][1])
    cost = model.flop_parts(variates)
    if any(cost.patches):
        rows.append(Row(part="patches", tokens=cost.tokens, own=cost.patches))
    for number, own in enumerate(cost.layers, start=1):
        rows.append(Row(part="layer", layer=number, name=str(number), tokens=cost.tokens, own=own))
    rows.append(Row(part="head", tokens=variates, own=cost.head))
    return Report(
        model=type(model).__name__,
        input_size=(model.lookback, variates),
        num_classes=model.horizon,
        forecast=True,
        method=None,
        scan=None,
        start=cost.tokens,
        rows=tuple(rows),
        unreduced=total(*(row.own for row in rows)),
    )


def _staged(model: Hierarchical, reduction: StagedReduction | None) -> Report:
    """Count a model of stages, each of which starts with all of its tokens."""
    cost, stages = model.flop_parts(), model.info.stages
    rows, number, before = [Row(part="patches", tokens=stages[0].tokens, own=cost.patches)], 0, 0
    for place, (stage, leading, blocks) in enumerate(
        zip(stages, cost.leading, cost.blocks, strict=True)
    ):
        if any(leading):
            part = "upsample" if stage.tokens > before else "downsample"
            rows.append(Row(part=part, tokens=stage.tokens, own=leading))
        before = stage.tokens
        if reduction is not None and reduction.stage(place).schedule.removed:
            rows += _stage_rows(model, reduction.stage(place), place, number)
        else:
            rows += [
                Row(
                    part="layer",
                    layer=number + n,
                    name=f"{place + 1}.{n}",
                    tokens=stage.tokens,
                    own=own,
                )
                for n, own in enumerate(blocks, start=1)
            ]
        number += len(blocks)
    rows.append(Row(part="head", tokens=1, own=cost.head))
    removes = reduction is not None and reduction.schedule.removed > 0
    name = reduction.name if reduction is not None and removes else None
    return Report(
        model=model.pretrained_cfg.get("architecture", type(model).__name__),
        input_size=model.img_size,
        num_classes=model.num_classes,
        method=name,
        scan=None if name is None else "compact",
        counted=name is None or name in OVERHEADS.names(),
        start=stages[0].tokens,
        rows=tuple(rows),
        unreduced=total(
            cost.patches, *cost.leading, *(own for each in cost.blocks for own in each), cost.head
        ),
    )


def _stage_rows(
    model: Hierarchical, reduction: Reduction, place: int, before: int
) -> Iterator[Row]:
    """Follow the kept cells of a stage, from 0, behind so many layers of others.

    Convolutions run on the map of the stage, or on the smaller grid that the kept cells form.
    """
    schedule, info = reduction.schedule, reduction.info
    method = cast(Reducer, reduction.method)
    width, inner, directions = info.width, model.mixer_width(place), info.directions
    kept: int = info.tokens
    grid: tuple[int, int] | None = info.grid
    for number, (block, removed) in enumerate(
        zip(model.stages[place], schedule.counts, strict=True), start=1
    ):
        sizes = Overhead(kept, removed, width, inner, directions, directions)
        left, after, spent = kept - removed, grid, FREE
        if removed:
            after = method.grid_after(grid, removed)
            spent = OVERHEADS[method.name](sizes) if method.name in OVERHEADS.names() else FREE
        # The kept cells of the mixer, and the map of its convolutions; then those behind it.
        seen, whole = (kept, grid) if schedule.after else (left, after)
        mixed, _ = model.branch_costs(block, whole or info.grid, seen)
        _, rest = model.branch_costs(block, after or info.grid, left)
        yield Row(
            part="layer",
            layer=before + number,
            name=f"{info.prefix}{number}",
            tokens=seen,
            removed=removed,
            own=total(mixed, rest),
            reduction=spent,
        )
        kept, grid = left, after


def _layer_rows(cost: ModelCost, reduction: Reduction) -> Iterator[Row]:
    """Follow tokens, and the grid they form as long as they form one, through the layers.

    Convolutions of tokens that form no grid run on the initial grid, among zeros.
    """
    schedule, method, info = reduction.schedule, reduction.method, reduction.info
    masked, gap = reduction.scan == "masked", reduction.gap_policy
    kept = info.tokens
    grid: tuple[int, int] | None = info.grid
    for layer, (own, removed) in enumerate(zip(cost.layers, schedule.counts, strict=True)):
        sizes = Overhead(
            kept, removed, info.width, cost.inner, info.directions, cost.published_directions
        )
        after, spent = grid, FREE
        if method is not None and removed:
            after = grid if masked else method.grid_after(grid, removed)
            known = method.name in OVERHEADS.names()
            spent = total(OVERHEADS[method.name](sizes) if known else FREE, carrying(sizes, gap))
        seen = info.tokens if masked else schedule.lengths[layer]
        yield Row(
            part="layer",
            layer=layer + 1,
            name=str(layer + 1),
            tokens=seen,
            removed=removed,
            own=own(seen, math.prod((grid if schedule.after else after) or info.grid)),
            alignment=alignment(seen, sizes, gap) if seen < info.tokens else FREE,
            reduction=spent,
        )
        kept, grid = kept - removed, after
