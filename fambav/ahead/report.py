"""What compiled kernels cost, as a table, as a file, and against what was recorded before."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

SLACK = 1.1  # of a loop's instructions
UNIT = 8  # registers of a thread are given out in eights


class AheadError(RuntimeError):
    """Kernels cannot be compiled ahead of time, or cost more than was recorded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled form of a kernel on one kind of GPU.

    Attributes:
        name: Of the form.
        arch: Compute capability without its dot, such as 90.
        registers: Of a thread.
        spill_bytes: Of a thread's stack, where registers go that do not fit.
        shared_bytes: Of a program.
        loops: Instructions of each innermost loop, in the order of the code.
        slots: Issue slots for 32 state-steps: what the warps of a program issue in one pass of each
            innermost loop, over what that pass does; None if that is not counted, or if the
            compiled loops are not those of the code.
        instructions: Of the whole kernel.
    """

    name: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    loops: tuple[int, ...]
    slots: float | None
    instructions: int

    @property
    def key(self) -> str:
        """What tells this row from the others."""
        return f"{self.name} on sm_{self.arch}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Compiled forms.

    Attributes:
        date: When they were compiled.
        triton: By which version.
        command: What makes this report again.
        rows: One for each form and kind of GPU.
    """

    date: str
    triton: str
    command: str
    rows: tuple[Row, ...]

    def json(self) -> str:
        """Return everything as JSON, with a line for each row."""
        told = dataclasses.asdict(self)
        rows = ",\n  ".join(json.dumps(row) for row in told.pop("rows"))
        return f'{json.dumps(told, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}'

    def text(self) -> str:
        """Return a table to read."""
        width = max(len("kernel"), *(len(row.name) for row in self.rows)) + 2
        lines = [f"kernels compiled ahead of time by triton {self.triton}", ""]
        lines.append(
            f"{'kernel':<{width}}{'arch':<7}{'registers':>9}{'spilled B':>11}{'shared B':>10}"
            f"{'slots per 32':>14}{'instructions':>14}  of each innermost loop"
        )
        for row in self.rows:
            slots = "-" if row.slots is None else f"{row.slots:.1f}"
            lines.append(
                f"{row.name:<{width}}sm_{row.arch:<4}{row.registers:>9}{row.spill_bytes:>11}"
                f"{row.shared_bytes:>10}{slots:>14}{row.instructions:>14}"
                f"  {' '.join(map(str, row.loops)) or '-'}"
            )
        return "\n".join(lines)


def read(path: Path) -> Report:
    """Read a report that was written as JSON.

    Raises:
        AheadError: If the file holds something else.
    """
    try:
        told = json.loads(path.read_text())
        rows = [row | {"loops": tuple(row["loops"])} for row in told.pop("rows")]
        return Report(**told, rows=tuple(Row(**row) for row in rows))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        wanted = "expected what fambav bench aot --json writes"
        raise AheadError(f"table is {path}, {wanted}: {error}") from error


def compare(report: Report, recorded: Report, *, only: str = "") -> None:
    """Refuse a report that is worse than the recorded one; see `objections`.

    Raises:
        AheadError: If there is an objection.
    """
    found = objections(report, recorded, only=only)
    if found:
        more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        raise AheadError(found[0] + more)


def objections(report: Report, recorded: Report, *, only: str = "") -> list[str]:
    """Say what got worse.

    Nothing may spill; registers may grow to the next multiple of eight, which costs nothing; a
    loop may grow by a tenth.  Another version of Triton brings another ptxas, which chooses other
    instructions: of its code only spills are objected to, and more than twice the registers, with
    which less than half as many warps run at once.

    Args:
        report: What was compiled.
        recorded: What it is compared with.
        only: The text that the names of both have, if not all forms were compiled.

    Returns:
        A sentence for each form that is worse, vanished or not recorded.
    """
    archs = {row.arch for row in report.rows}
    before = {row.key: row for row in recorded.rows if row.arch in archs and only in row.name}
    now = {row.key: row for row in report.rows}
    found = [
        f"{key} is not compiled, expected it as recorded" for key in before.keys() - now.keys()
    ]
    found += [f"{key} is not recorded, expected it to be" for key in now.keys() - before.keys()]
    same = report.triton == recorded.triton
    for key in before.keys() & now.keys():
        found += [f"{key}: {text}" for text in _worse(now[key], before[key], same=same)]
    return sorted(found)


def _worse(row: Row, recorded: Row, *, same: bool) -> Iterator[str]:
    if row.spill_bytes:
        yield f"spilled bytes are {row.spill_bytes}, expected 0"
    most = recorded.registers if same else 2 * recorded.registers
    limit = min(255, math.ceil(most / UNIT) * UNIT)
    if row.registers > limit:
        yield f"registers are {row.registers}, expected at most {limit}"
    if not same:
        return
    if len(row.loops) != len(recorded.loops):
        yield f"innermost loops are {len(row.loops)}, expected {len(recorded.loops)}"
    elif any(a > SLACK * b for a, b in zip(row.loops, recorded.loops, strict=True)):
        limits = [math.floor(SLACK * n) for n in recorded.loops]
        yield f"instructions of loops are {_list(row.loops)}, expected at most {_list(limits)}"


def _list(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
