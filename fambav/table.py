"""A table as text, Markdown and LaTeX for people, as CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fambav.text import printable

Cells = Sequence[str]
Rows = Sequence[Mapping[str, Any]]

_FOR_PROGRAMS = ("csv", "json")
FORMATS = ("text", "markdown", "latex", *_FOR_PROGRAMS)

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "[": "{[}",  # after a line break it would begin an argument
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells, what stands above and below them, and the same as plain values.

    Attributes:
        head: Names of the columns.
        rows: The cells of each row, as many as the head has.
        names: Number of columns at the left that are no figures; in text and LaTeX a name that
            repeats the row above, as all at its left do, is empty.
        notes: Lines below the table.
        title: Line above it; may be empty.
        sides: "<" or ">" of each column of text; by default the names stand left, figures right.
        values: Rows of plain values for CSV, the first of them its head; None is an empty cell.
        document: What JSON holds.
    """

    head: Cells
    rows: Sequence[Cells]
    names: int
    notes: Sequence[str] = ()
    title: str = ""
    sides: str = ""
    values: Sequence[Sequence[Any]] = ()
    document: Any = None

    @classmethod
    def of_records(cls, rows: Rows) -> Table:
        """Return a table of mappings with the same keys, which name the columns.

        Args:
            rows: One at least; see `cell` for how their values are written.
        """
        first = rows[0]
        return cls(
            head=[name.replace("_", " ") for name in first],
            rows=[list(map(cell, row.values())) for row in rows],
            names=1,
            sides="".join("<" if isinstance(value, str) else ">" for value in first.values()),
        )

    def render(self, form: str) -> str:
        """Return the table in one of FORMATS, without a line break at the end."""
        shown = self if form in _FOR_PROGRAMS else self._printable()
        return {
            "text": shown._text,
            "markdown": shown._markdown,
            "latex": shown._latex,
            "csv": shown._csv,
            "json": shown._json,
        }[form]()

    def _printable(self) -> Table:
        """The same with cells and lines that names of runs cannot break."""
        return replace(
            self,
            title=printable(self.title),
            head=list(map(printable, self.head)),
            rows=[list(map(printable, row)) for row in self.rows],
            notes=list(map(printable, self.notes)),
        )

    def _text(self) -> str:
        sides = self.sides or "<" * self.names + ">" * (len(self.head) - self.names)
        title = [self.title, ""] if self.title else []
        notes = ["", *self.notes] if self.notes else []
        return "\n".join([*title, *_aligned([self.head, *self._grouped()], sides), *notes])

    def _markdown(self) -> str:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---" * self.names + "|---:" * (len(self.head) - self.names) + "|")
        notes = [line for note in self.notes for line in ("", note)]
        title = [self.title, ""] if self.title else []
        return "\n".join([*title, *lines, *notes])

    def _latex(self) -> str:
        """A float for a document that loads booktabs; the notes are comments below it."""
        columns = "l" * self.names + "r" * (len(self.head) - self.names)
        caption = [rf"\caption{{{_escaped(self.title)}}}"] if self.title else []
        head, *body = (
            rf"{' & '.join(map(_escaped, row))} \\" for row in (self.head, *self._grouped())
        )
        lines = [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            *caption,
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join([*lines, *(f"% {' '.join(note.split())}" for note in self.notes)])

    def _csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.values)
        return text.getvalue().removesuffix("\n")

    def _json(self) -> str:
        return json.dumps(self.document, indent=1)

    def _grouped(self) -> list[Cells]:
        """The rows, without names that only repeat what stands above them."""
        grouped: list[Cells] = []
        above: Cells = ()
        for row in self.rows:
            same = 0
            while same < self.names - 1 and above and row[same] == above[same]:
                same += 1
            grouped.append([""] * same + list(row[same:]))
            above = row
        return grouped


def cell(value: Any) -> str:
    """Write a value for people: a float with about three digits, a list as its values."""
    if value is None:
        return "-"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return f"{len(value)} values"
    if isinstance(value, tuple | list):
        return " .. ".join(map(cell, value))
    return str(value)


def json_document(head: Mapping[str, Any], **records: Rows | Mapping[str, Rows]) -> str:
    """Return an object as JSON, with a line for each record.

    Args:
        head: Its first entries.
        records: Its other entries: lists of records, or such lists by their titles.
    """
    entries = [json.dumps(head, indent=1)[:-2]]
    for name, rows in records.items():
        if isinstance(rows, Mapping):
            own = ",\n".join(f"  {json.dumps(title)}: {_lines(one)}" for title, one in rows.items())
            entries.append(f' "{name}": {{\n{own}\n }}')
        else:
            entries.append(f' "{name}": {_lines(rows)}')
    return ",\n".join(entries) + "\n}"


def _lines(rows: Rows) -> str:
    return "[\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]"


def _aligned(rows: Sequence[Cells], sides: Sequence[str]) -> list[str]:
    """Lay rows of as many cells out in columns; sides as in a format."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def _escaped(text: str) -> str:
    """Text as LaTeX takes it; a difference in brackets gets a true minus sign."""
    plain = "".join(_LATEX.get(sign, sign) for sign in text)
    return re.sub(r"(?<![\w$])([+-])(?=[0-9])", r"$\1$", plain)
