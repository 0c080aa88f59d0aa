"""Ahead-of-time kernel audit: what every Triton kernel costs in machine code, without a GPU.

    python benchmarks/aot.py --against benchmarks/aot.json     nothing may be worse than recorded
    python benchmarks/aot.py --json benchmarks/aot.json        record anew

Every form that a module of `fambav.ops.triton` yields through `variants()` is compiled;
registers, spilled bytes and the instructions of each innermost loop are counted.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fambav.bench.report import MeasureError, table
from fambav.cli import guarded
from fambav.commands.output import show
from fambav.commands.parser import Parser

if TYPE_CHECKING:
    from fambav.ops.triton.variant import Variant

ARCHS = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities that Triton compiles for
KERNELS = "fambav.ops.triton"
COMMAND = "python benchmarks/aot.py --json FILE"
SLACK = 1.1  # of a loop's instructions
UNIT = 8  # registers of a thread are given out in eights
ALIGNED = [["tt.divisibility", 16]]
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;")
BRANCH = re.compile(r"(?P<guard>@\S+\s+)?BRA\S*\s+(?P<condition>.*?)`\((?P<label>\.L_x_\d+)\)")
LEAVES = re.compile(r"(EXIT|RET)\b")  # under no predicate


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
class Audit:
    """Compiled forms.

    Attributes:
        date: When they were compiled.
        triton: By which version.
        command: What makes this table again.
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
        rows = [
            {
                "kernel": row.name,
                "arch": f"sm_{row.arch}",
                "registers": row.registers,
                "spilled_B": row.spill_bytes,
                "shared_B": row.shared_bytes,
                "slots_per_32": row.slots,
                "instructions": row.instructions,
                "of_each_innermost_loop": _list(row.loops) or "-",
            }
            for row in self.rows
        ]
        return "\n".join(
            [f"kernels compiled ahead of time by triton {self.triton}", "", *table(rows)]
        )


def main(words: list[str]) -> None:
    """Compile the Triton kernels without a GPU and count registers, spills and instructions."""
    parser = Parser("benchmarks/aot.py", description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=[80, 90], help="compute capability"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="of a kernel's name")
    parser.add_argument("--against", type=Path, metavar="FILE", help="refuse what is worse there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args(words)
    recorded = None if given.against is None else read(given.against)
    found = audit(given.arch, only=given.only)
    show(found.text(), found.json(), given.json)
    if recorded is not None:
        compare(found, recorded, only=given.only)


def read(path: Path) -> Audit:
    """Read a table that was written as JSON.

    Raises:
        MeasureError: If the file holds something else.
    """
    try:
        told = json.loads(path.read_text())
        rows = [row | {"loops": tuple(row["loops"])} for row in told.pop("rows")]
        return Audit(**told, rows=tuple(Row(**row) for row in rows))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        wanted = "expected what benchmarks/aot.py --json writes"
        raise MeasureError(f"table is {path}, {wanted}: {error}") from error


def compare(found: Audit, recorded: Audit, *, only: str = "") -> None:
    """Refuse a table that is worse than the recorded one; see `objections`.

    Raises:
        MeasureError: If there is an objection.
    """
    worse = objections(found, recorded, only=only)
    if worse:
        more = f"; and {len(worse) - 1} more" if len(worse) > 1 else ""
        raise MeasureError(worse[0] + more)


def objections(found: Audit, recorded: Audit, *, only: str = "") -> list[str]:
    """Say what got worse.

    Nothing may spill; registers may grow to the next multiple of eight, which costs nothing; a
    loop may grow by a tenth.  Another version of Triton brings another ptxas, which chooses other
    instructions: of its code only spills are objected to, and more than twice the registers, with
    which less than half as many warps run at once.

    Args:
        found: What was compiled.
        recorded: What it is compared with.
        only: The text that the names of both have, if not all forms were compiled.

    Returns:
        A sentence for each form that is worse, vanished or not recorded.
    """
    archs = {row.arch for row in found.rows}
    before = {row.key: row for row in recorded.rows if row.arch in archs and only in row.name}
    now = {row.key: row for row in found.rows}
    worse = [f"{key} is not compiled, expected it as recorded" for key in before.keys() - now]
    worse += [f"{key} is not recorded, expected it to be" for key in now.keys() - before]
    same = found.triton == recorded.triton
    for key in before.keys() & now.keys():
        worse += [f"{key}: {text}" for text in _worse(now[key], before[key], same=same)]
    return sorted(worse)


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


def audit(archs: Sequence[int], *, only: str = "", package: str = KERNELS) -> Audit:
    """Compile the forms that the modules of a package yield through `variants()`.

    Triton's own cache is used, whose key is all that a launch depends on too.

    Args:
        archs: Compute capabilities without their dots, such as 80 and 90.
        only: Text that the name of a form must hold.
        package: Whose modules are asked.

    Returns:
        A row for each form and capability.

    Raises:
        MeasureError: If Triton is missing or interprets kernels, or a kernel does not compile.
    """
    try:
        import triton
    except ModuleNotFoundError as error:
        hint = "pip install 'fambav[triton]'"
        raise MeasureError(f"triton is not installed, expected it; {hint}") from error
    if triton.knobs.runtime.interpret:
        value = os.environ.get("TRITON_INTERPRET")
        raise MeasureError(f"TRITON_INTERPRET is {value!r}, expected it unset: nothing is compiled")
    known = _variants(package)
    names = [name for name in known if only in name]
    if not names:
        raise MeasureError(f"--only is {only!r}, expected a part of one of {len(known)} names")
    jobs = [(package, name, arch) for name in names for arch in archs]
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = tuple(pool.map(_row, *zip(*jobs, strict=True)))
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    return Audit(date=str(today), triton=triton.__version__, command=COMMAND, rows=rows)


@functools.cache
def _variants(package: str) -> dict[str, Variant]:
    """Return every form by its name."""
    found: dict[str, Variant] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        loaded = importlib.import_module(f"{package}.{module.name}")
        for variant in getattr(loaded, "variants", tuple)():
            if variant.name in found:
                raise MeasureError(f"kernel's name is {variant.name!r} twice, expected it once")
            found[variant.name] = variant
    return found


def _row(package: str, name: str, arch: int) -> Row:
    """Compile one form and measure it."""
    variant = _variants(package)[name]
    compiled = _compile(variant, arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = USAGE.search(_tool("cuobjdump", "-res-usage", str(path)))
        code = _tool("nvdisasm", "-c", "-ndf", str(path))
    if usage is None:
        raise MeasureError(f"resources of {name} are missing, expected them from cuobjdump")
    registers, spill_bytes = map(int, usage.groups())
    instructions, loops = code_size(code)
    slots = None
    if loops and len(loops) == len(variant.loop_work):  # after unrolling they are others
        each = zip(loops, variant.loop_work, strict=True)
        slots = round(sum(32 * variant.warps * length / work for length, work in each), 2)
    return Row(
        name=name,
        arch=arch,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        loops=loops,
        slots=slots,
        instructions=instructions,
    )


def _compile(variant: Variant, arch: int) -> Any:
    """Return one form as Triton compiles it.

    Raises:
        MeasureError: If it does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    from fambav.ops.triton.launch import OPTIONS

    constants = {**variant.constants, **dict.fromkeys(variant.ones, 1)}
    places = {name: (place,) for place, name in enumerate(variant.kernel.arg_names)}
    source = ASTSource(
        variant.kernel,
        {name: "constexpr" if name in constants else variant.types[name] for name in places},
        {places[name]: value for name, value in constants.items()},
        {places[name]: ALIGNED for name in variant.aligned if name not in constants},
    )
    try:
        return triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={**OPTIONS, "num_warps": variant.warps, "maxnreg": variant.registers},
        )
    except (TritonError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1:]
        told = f"{variant.name} does not compile for sm_{arch}, expected it to"
        raise MeasureError(": ".join([told, *reason])) from error


def _tool(name: str, *arguments: str) -> str:
    """Run one of the programs that come with Triton; return what it prints."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MeasureError(f"{name} fails: {done.stderr.strip()}")
    return done.stdout


def code_size(code: str) -> tuple[int, tuple[int, ...]]:
    """Count the instructions of a kernel.

    A loop is what a branch back to a block that dominates it closes (Aho, Lam, Sethi and Ullman,
    "Compilers", 9.6.6), so a jump from out-of-line code back into the main line is none.  Nor is
    the instruction after the end that branches to itself.  A branch is counted with both its
    sides, which is what a warp issues at most.

    Args:
        code: What `nvdisasm -c` prints of one kernel.

    Returns:
        The instructions of the whole kernel, without padding, and those of one pass of each
        innermost loop, in the order of the code.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}  # before which instruction each stands
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found[1])
    lengths, following = _blocks(instructions, labels)
    loops = _loops(following)
    innermost = [
        body
        for header, body in sorted(loops.items())
        if not any(other in body for other in loops if other != header)
    ]
    whole = sum(not text.startswith("NOP") for text in instructions)
    return whole, tuple(sum(lengths[n] for n in body) for body in innermost)


def _blocks(
    instructions: list[str], labels: Mapping[str, int]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Cut the code at its labels and after what does not simply go on.

    Returns:
        The instructions of every block, and the blocks that may follow it.
    """
    turns = [n + 1 for n, t in enumerate(instructions) if BRANCH.match(t) or LEAVES.match(t)]
    starts = sorted({0, *labels.values(), *turns} - {len(instructions)})
    number = {start: n for n, start in enumerate(starts)}
    ends = [*starts[1:], len(instructions)]
    following = [
        tuple(number[p] for p in _followers(instructions[end - 1], end, labels) if p in number)
        for end in ends
    ]
    return [end - start for start, end in zip(starts, ends, strict=True)], following


def _followers(text: str, end: int, labels: Mapping[str, int]) -> Iterator[int]:
    """Yield the places where the code may go on after the last instruction of a block."""
    branch = BRANCH.match(text)
    if branch is not None:
        yield labels[branch["label"]]
    unconditional = branch is not None and not (branch["guard"] or branch["condition"])
    if not unconditional and not LEAVES.match(text):
        yield end


def _loops(following: list[tuple[int, ...]]) -> dict[int, set[int]]:
    """Return the blocks of every natural loop by its first block."""
    before = _before(following)
    loops: dict[int, set[int]] = {}
    for n, dominators in _dominators(before).items():
        for header in set(following[n]) & dominators:
            body = loops.setdefault(header, {header})
            waiting = [n]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting += before[inside]
    return loops


def _before(following: list[tuple[int, ...]]) -> dict[int, set[int]]:
    """Return, for each block that the first one reaches, those that may come just before it."""
    before: dict[int, set[int]] = {0: set()}
    waiting = [0]
    while waiting:
        n = waiting.pop()
        for follower in following[n]:
            if follower not in before:
                before[follower] = set()
                waiting.append(follower)
            before[follower].add(n)
    return before


def _dominators(before: Mapping[int, set[int]]) -> dict[int, set[int]]:
    """Return, for each block, those that every way to it from the first one passes."""
    found = {n: set(before) if n else {0} for n in sorted(before)}
    changed = True
    while changed:
        changed = False
        for n in found:
            if n:
                new = {n} | set.intersection(*(found[other] for other in before[n]))
                changed |= new != found[n]
                found[n] = new
    return found


if __name__ == "__main__":
    raise SystemExit(guarded(main, sys.argv[1:]))
