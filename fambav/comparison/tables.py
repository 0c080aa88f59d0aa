"""A table of texts, drawn for a terminal, in Markdown and in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Cells = Sequence[str]

FORMATS = ("text", "markdown", "latex", "csv", "json")

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
    """Cells, and what stands above and below them.

    Attributes:
        head: Names of the columns.
        rows: The cells of each row, as many as the head has.
        names: Columns at the left that are no figures; one that repeats the row above, as all at
            its left do, is left empty where people read it.
        notes: Lines below the table.
        title: Line above it; may be empty.
    """

    head: Cells
    rows: Sequence[Cells]
    names: int
    notes: Sequence[str] = ()
    title: str = ""

    def drawn(self, form: str) -> str:
        """Return the table as text.

        Args:
            form: "text", "markdown" or "latex".
        """
        return {"text": self._text, "markdown": self._markdown, "latex": self._latex}[form]()

    def _text(self) -> str:
        rows = [self.head, *self._grouped()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(_padded(row, widths, self.names)).rstrip() for row in rows]
        title = [self.title, ""] if self.title else []
        return "\n".join([*title, *lines, "", *self.notes])

    def _markdown(self) -> str:
        rows = [[_barred(cell) for cell in row] for row in (self.head, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---" * self.names + "|---:" * (len(self.head) - self.names) + "|")
        notes = [line for note in self.notes for line in ("", note)]
        title = [self.title, ""] if self.title else []
        return "\n".join([*title, *lines, *notes])

    def _latex(self) -> str:
        """A float for a document that loads booktabs; the notes are comments below it."""
        columns = "l" * self.names + "r" * (len(self.head) - self.names)
        caption = [rf"\caption{{{escaped(self.title)}}}"] if self.title else []
        lines = [
            r"\begin{table}",
            r"\centering",
            *caption,
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _row(self.head),
            r"\midrule",
            *map(_row, self._grouped()),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        notes = [f"% {' '.join(note.split())}" for note in self.notes]
        return "\n".join([r"% needs \usepackage{booktabs}", *lines, *notes])

    def _grouped(self) -> list[Cells]:
        """The rows, without names that only repeat what stands above them."""
        found: list[Cells] = []
        above: Cells = ()
        for row in self.rows:
            same = 0
            while same < self.names - 1 and above and row[same] == above[same]:
                same += 1
            found.append([""] * same + list(row[same:]))
            above = row
        return found


def escaped(text: str) -> str:
    """Return text as LaTeX takes it; a difference in brackets gets a true minus sign."""
    plain = "".join(_LATEX.get(sign, sign) for sign in text)
    return re.sub(r"(?<![\w$])([+-])(?=[0-9])", r"$\1$", plain)


def _row(cells: Cells) -> str:
    return rf"{' & '.join(map(escaped, cells))} \\"


def _barred(cell: str) -> str:
    return cell.replace("|", "\\|")


def _padded(row: Cells, widths: Sequence[int], names: int) -> Cells:
    pairs = list(zip(row, widths, strict=True))
    left, figures = pairs[:names], pairs[names:]
    return [t.ljust(width) for t, width in left] + [t.rjust(width) for t, width in figures]
