"""The cost of an image, part by part, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fambav.models.flops import CONVENTIONS, FREE, Cost, total
from fambav.table import Table

Cells = tuple[str, ...]

_HEAD: Cells = ("part", "tokens", "removed", *CONVENTIONS)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One part of a model.

    Attributes:
        part: "patches", "layer" or "head".
        layer: Number of the layer, from 1; None for the other parts.
        tokens: Tokens that the part works on; of a layer, those that its mixer sees.
        removed: Tokens that go at this layer.
        own: Cost of the part by itself.
        alignment: Cost of scanning as if tokens that went were still there.
        reduction: Cost of choosing and taking away tokens.
    """

    part: str
    layer: int | None = None
    tokens: int
    removed: int = 0
    own: Cost
    alignment: Cost = FREE
    reduction: Cost = FREE


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one image costs.

    Attributes:
        model: Name of the model.
        input_size: Height and width of an image, in pixels.
        num_classes: Length of the output.
        method: Name of the method of reduction; None if no tokens go.
        scan: What the scan makes of tokens that went; None if none go.
        counted: Whether it is known what choosing tokens costs; if not, it counts nothing.
        start: Tokens before the first layer, class tokens included.
        rows: The parts, in the order in which an image meets them.
        dense: Cost of the model without reduction.
    """

    model: str
    input_size: tuple[int, int]
    num_classes: int
    method: str | None
    scan: str | None
    counted: bool = True
    start: int
    rows: tuple[Row, ...]
    dense: Cost

    @property
    def reduction(self) -> Cost:
        """Cost of choosing and taking away tokens, over all layers."""
        return total(*(row.reduction for row in self.rows))

    @property
    def alignment(self) -> Cost:
        """Cost of scanning as if tokens that went were still there, over all layers."""
        return total(*(row.alignment for row in self.rows))

    @property
    def total(self) -> Cost:
        """Cost of everything."""
        return total(*(row.own for row in self.rows), self.reduction, self.alignment)

    def table(self) -> Table:
        """Return the parts as a table; neighbouring layers that are equal share a line."""
        rows, notes = list(self._lines()), self._notes()
        return Table(head=_HEAD, rows=rows, names=1, title=self._title(), notes=notes)

    def json(self) -> str:
        """Return everything as JSON, counts as whole numbers under the conventions' names."""
        told: dict[str, Any] = {
            name: _plain(value) for name, value in vars(self).items() if name != "rows"
        }
        for name in ("reduction", "alignment", "total"):
            told[name] = _plain(getattr(self, name))
        told["conventions"] = CONVENTIONS
        each = ({name: _plain(value) for name, value in vars(row).items()} for row in self.rows)
        rows = ",\n  ".join(map(json.dumps, each))
        return f'{json.dumps(told, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}'

    def _title(self) -> str:
        height, width = self.input_size
        what = f"{self.model}, {height} x {width} pixels, {self.num_classes} classes"
        gone = sum(row.removed for row in self.rows)
        how = f"{self.method} removes {gone}, {self.scan} scan" if self.method else "none go"
        return f"{what}: {self.start} tokens, {how}"

    def _notes(self) -> list[str]:
        name, _ = self._unit()
        unit = f"in {name} operations for one image; a line of several layers is their sum"
        if not self.counted:
            unit += f"; what choosing costs {self.method} is not known, and not counted"
        return [unit, *(f"{name}: {meaning}" for name, meaning in CONVENTIONS.items())]

    def _unit(self) -> tuple[str, float]:
        return ("G (1e9)", 1e9) if self.dense.literature >= 1e9 else ("M (1e6)", 1e6)

    def _lines(self) -> Iterator[Cells]:
        for (part, tokens, removed), run in groupby(
            self.rows, key=lambda row: (row.part, row.tokens, row.removed)
        ):
            rows = list(run)
            if part == "head":
                yield from self._extra()
            yield self._line(
                _span(rows), str(tokens), str(removed or "-"), total(*(row.own for row in rows))
            )
        yield self._line("total", "", "", self.total)
        if self.method:
            yield self._line("without reduction", "", "", self.dense)
            yield "share left", "", "", *_shares(self.total, self.dense)
            spent = total(self.reduction, self.alignment)
            yield "spent on reduction", "", "", *_shares(spent, self.total)

    def _extra(self) -> Iterator[Cells]:
        """Cells of what reduction adds to the layers."""
        if self.method:
            yield self._line("reduction", "", "", self.reduction)
        if any(self.alignment):
            yield self._line("alignment", "", "", self.alignment)

    def _line(self, part: str, tokens: str, removed: str, cost: Cost) -> Cells:
        _, size = self._unit()
        return part, tokens, removed, *(f"{number / size:.4f}" for number in cost)


def _span(rows: list[Row]) -> str:
    """Name a run of parts of one kind."""
    first, last = rows[0], rows[-1]
    if first.layer is None:
        return first.part
    if last is first:
        return f"layer {first.layer}"
    return f"layers {first.layer}-{last.layer}"


def _shares(part: Cost, whole: Cost) -> Cells:
    """Return each convention's share in percent."""
    return tuple(f"{100 * a / b:.1f}%" for a, b in zip(part, whole, strict=True))


def _plain(value: Any) -> Any:
    """Return a cost under the conventions' names, and anything else as it is."""
    return value.json() if isinstance(value, Cost) else value
