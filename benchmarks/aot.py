"""Ahead-of-time kernel audit: registers, spills and instructions of every Triton kernel.

    python benchmarks/aot.py --against benchmarks/aot.json     fail on a regression
    python benchmarks/aot.py --json benchmarks/aot.json        record anew

Every specialization that a module of `fambav.ops.triton` yields from `variants()` is compiled, for
which no GPU is needed.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
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

from fambav.bench.report import MeasureError
from fambav.cli import guarded
from fambav.commands.output import show
from fambav.commands.parser import Parser
from fambav.table import Table, json_document

if TYPE_CHECKING:
    from fambav.ops.triton.variant import Variant

ARCHS = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities
KERNELS = "fambav.ops.triton"
COMMAND = "python benchmarks/aot.py --json FILE"
SLACK = 1.1  # tolerated growth of a loop
UNIT = 8  # granularity of the registers of a thread
ALIGNED = [["tt.divisibility", 16]]
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;")
BRANCH = re.compile(r"(?P<guard>@\S+\s+)?BRA\S*\s+(?P<condition>.*?)`\((?P<label>\.L_x_\d+)\)")
LEAVES = re.compile(r"(EXIT|RET)\b")  # without a predicate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One specialization of a kernel on one architecture.

    Attributes:
        name: Of the specialization.
        arch: Compute capability without its dot, such as 90.
        registers: Per thread.
        spill_bytes: Of the stack of a thread, to which registers spill.
        shared_bytes: Per program.
        loops: Instructions of each innermost loop, in code order.
        slots: Issue slots per 32 state-steps: warp instructions of one iteration of each innermost
            loop over its state-steps; None if those are not known, or if unrolling changed the
            loops.
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
        """The name and the architecture."""
        return f"{self.name} on sm_{self.arch}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """Compiled specializations.

    Attributes:
        date: Of compilation.
        triton: Its version.
        command: To reproduce the table.
        rows: One for each specialization and architecture.
    """

    date: str
    triton: str
    command: str
    rows: tuple[Row, ...]

    def json(self) -> str:
        """Return everything as JSON, with a line for each row."""
        head = dataclasses.asdict(self)
        return json_document(head, rows=head.pop("rows"))

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
        title = f"kernels compiled ahead of time by triton {self.triton}"
        return f"{title}\n\n{Table.of_records(rows).render('text')}"


def main(words: list[str]) -> None:
    """Compile the Triton kernels without a GPU and count registers, spills and instructions."""
    parser = Parser("benchmarks/aot.py", description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=[80, 90], help="compute capability"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="of a kernel's name")
    parser.add_argument("--against", type=Path, metavar="FILE", help="fail on a regression")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args(words)
    recorded = None if given.against is None else read(given.against)
    current = audit(given.arch, only=given.only)
    show(current.text(), current.json(), given.json)
    if recorded is not None:
        compare(current, recorded, only=given.only)


def read(path: Path) -> Audit:
    """Read a table written by `--json`.

    Raises:
        MeasureError: If the file is another.
    """
    try:
        head = json.loads(path.read_text())
        rows = [row | {"loops": tuple(row["loops"])} for row in head.pop("rows")]
        return Audit(**head, rows=tuple(Row(**row) for row in rows))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        wanted = "expected what benchmarks/aot.py --json writes"
        raise MeasureError(f"table is {path}, {wanted}: {error}") from error


def compare(current: Audit, recorded: Audit, *, only: str = "") -> None:
    """Compare a table with the recorded one.

    Raises:
        MeasureError: If there is a regression; see `regressions`.
    """
    worse = regressions(current, recorded, only=only)
    if worse:
        more = f"; and {len(worse) - 1} more" if len(worse) > 1 else ""
        raise MeasureError(worse[0] + more)


def regressions(current: Audit, recorded: Audit, *, only: str = "") -> list[str]:
    """Return the regressions of a table.

    Nothing may spill; registers may grow to the next multiple of eight, which does not change the
    occupancy; a loop may grow by a tenth.  Another version of Triton has another ptxas and other
    instructions: there only spills are regressions, and more than twice the registers, which halves
    the occupancy.

    Args:
        current: The new table.
        recorded: The table to compare with.
        only: Text in all names, if not all specializations were compiled.

    Returns:
        A sentence for each specialization that is worse, missing or not recorded.
    """
    archs = {row.arch for row in current.rows}
    before = {row.key: row for row in recorded.rows if row.arch in archs and only in row.name}
    now = {row.key: row for row in current.rows}
    worse = [f"{key} is not compiled, expected it as recorded" for key in before.keys() - now]
    worse += [f"{key} is not recorded, expected it to be" for key in now.keys() - before]
    same = current.triton == recorded.triton
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
    """Compile the specializations that the modules of a package yield from `variants()`.

    Triton's own cache is used, whose key is the same as for a launch.

    Args:
        archs: Compute capabilities without their dots, such as 80 and 90.
        only: Text in the name of a specialization.
        package: With the kernels.

    Returns:
        A row for each specialization and architecture.

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
    """Return every specialization by its name."""
    named: dict[str, Variant] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        loaded = importlib.import_module(f"{package}.{module.name}")
        for variant in getattr(loaded, "variants", tuple)():
            if variant.name in named:
                raise MeasureError(f"kernel's name is {variant.name!r} twice, expected it once")
            named[variant.name] = variant
    return named


def _row(package: str, name: str, arch: int) -> Row:
    """Compile one specialization and measure it."""
    variant = _variants(package)[name]
    compiled = _compile(variant, arch)
    shown = _shown(compiled.asm["cubin"])
    usage, (instructions, loops) = USAGE.search(shown), code_size(shown)
    if usage is None:
        raise MeasureError(f"resources of {name} are missing, expected them from cuobjdump")
    registers, spill_bytes = map(int, usage.groups())
    slots = None
    if loops and len(loops) == len(variant.loop_work):  # unrolling may have changed them
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
    """Compile one specialization.

    Raises:
        MeasureError: If it does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    from fambav.ops.triton.launch import OPTIONS

    constants = {**variant.constants, **dict.fromkeys(variant.ones, 1)}
    index = {name: (n,) for n, name in enumerate(variant.kernel.arg_names)}
    source = ASTSource(
        variant.kernel,
        {name: "constexpr" if name in constants else variant.types[name] for name in index},
        {index[name]: value for name, value in constants.items()},
        {index[name]: ALIGNED for name in variant.aligned if name not in constants},
    )
    try:
        return triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={**OPTIONS, "num_warps": variant.warps, "maxnreg": variant.registers},
        )
    except (TritonError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1:]
        failure = f"{variant.name} does not compile for sm_{arch}, expected it to"
        raise MeasureError(": ".join([failure, *reason])) from error


def _shown(cubin: bytes) -> str:
    """Return what Triton's programs say of a kernel's resources and code.

    It is kept in Triton's cache, as the kernel is.
    """
    from triton.runtime.cache import get_cache_manager

    kept = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    known = kept.get_file("shown.txt")
    if known is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            usage = _tool("cuobjdump", "-res-usage", str(path))
            code = _tool("nvdisasm", "-c", "-ndf", str(path))
        known = kept.put(usage + code, "shown.txt", binary=False)
    return Path(known).read_text()


def _tool(name: str, *arguments: str) -> str:
    """Run one of the programs bundled with Triton; return its output."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MeasureError(f"{name} fails: {done.stderr.strip()}")
    return done.stdout


def code_size(code: str) -> tuple[int, tuple[int, ...]]:
    """Count the instructions of a kernel.

    Loops are natural loops: a back edge goes to a block that dominates its source.  A jump from
    out-of-line code back into the main line is none, nor is the instruction after the end that
    branches to itself.  Both sides of a branch are counted, the most that a warp issues.

    Args:
        code: Output of `nvdisasm -c` for one kernel.

    Returns:
        The instructions of the whole kernel, without padding, and those of one iteration of each
        innermost loop, in code order.

    Source: Aho, Lam, Sethi and Ullman, "Compilers", section 9.6.6.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}  # index of the instruction after each
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction[1])
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
    """Split the code into basic blocks.

    Returns:
        The number of instructions of every block, and its successors.
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
    """Yield the indices of the instructions that may follow the last one of a block."""
    branch = BRANCH.match(text)
    if branch is not None:
        yield labels[branch["label"]]
    unconditional = branch is not None and not (branch["guard"] or branch["condition"])
    if not unconditional and not LEAVES.match(text):
        yield end


def _loops(following: list[tuple[int, ...]]) -> dict[int, set[int]]:
    """Return the blocks of every natural loop by its header."""
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
    """Return the predecessors of each block that is reachable from the first."""
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
    """Return the dominators of each block."""
    dominators = {n: set(before) if n else {0} for n in sorted(before)}
    changed = True
    while changed:
        changed = False
        for n in dominators:
            if n:
                new = {n} | set.intersection(*(dominators[other] for other in before[n]))
                changed |= new != dominators[n]
                dominators[n] = new
    return dominators


if __name__ == "__main__":
    raise SystemExit(guarded(main, sys.argv[1:]))
