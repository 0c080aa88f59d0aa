"""Machine code of NVIDIA GPUs, as nvdisasm prints it: how long a kernel and its loops are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;")
BRANCH = re.compile(r"(?P<guard>@\S+\s+)?BRA\S*\s+(?P<condition>.*?)`\((?P<label>\.L_x_\d+)\)")
LEAVES = re.compile(r"(EXIT|RET)\b")  # under no predicate


class Size(NamedTuple):
    """How long a kernel is.

    Attributes:
        instructions: Of the whole kernel, without padding.
        loops: Of one pass of each innermost loop, in the order of the code.
    """

    instructions: int
    loops: tuple[int, ...]


class _Block(NamedTuple):
    """Instructions that run one after another, and the numbers of the blocks that may follow."""

    length: int
    next: tuple[int, ...]


def size(code: str) -> Size:
    """Count the instructions of a kernel.

    A loop is what a branch back to a block that dominates it closes (Aho, Lam, Sethi and Ullman,
    "Compilers", 9.6.6), so a jump from out-of-line code back into the main line is none.  Nor is
    the instruction after the end that branches to itself.  A branch is counted with both its
    sides, which is what a warp issues at most.

    Args:
        code: What `nvdisasm -c` prints of one kernel.

    Returns:
        The numbers of instructions.
    """
    instructions, labels = _parse(code)
    blocks = _blocks(instructions, labels)
    loops = _loops(blocks)
    innermost = {
        header: body
        for header, body in loops.items()
        if not any(other in body for other in loops if other != header)
    }
    return Size(
        instructions=sum(not text.startswith("NOP") for text in instructions),
        loops=tuple(
            sum(blocks[n].length for n in innermost[header]) for header in sorted(innermost)
        ),
    )


def _parse(code: str) -> tuple[list[str], dict[str, int]]:
    """Return every instruction, and before which of them each label stands."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found[1])
    return instructions, labels


def _blocks(instructions: list[str], labels: Mapping[str, int]) -> list[_Block]:
    """Cut the code at its labels and after what does not simply go on."""
    turns = [n + 1 for n, text in enumerate(instructions) if _goes_elsewhere(text)]
    starts = sorted({0, *labels.values(), *turns} - {len(instructions)})
    number = {start: n for n, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        places = _followers(instructions[end - 1], end, labels)
        blocks.append(_Block(end - start, tuple(number[p] for p in places if p in number)))
    return blocks


def _goes_elsewhere(text: str) -> bool:
    return BRANCH.match(text) is not None or LEAVES.match(text) is not None


def _followers(text: str, end: int, labels: Mapping[str, int]) -> Iterator[int]:
    """Yield the places where the code may go on after the last instruction of a block."""
    branch = BRANCH.match(text)
    if branch is not None:
        yield labels[branch["label"]]
    unconditional = branch is not None and not (branch["guard"] or branch["condition"])
    if not unconditional and not LEAVES.match(text):
        yield end


def _loops(blocks: list[_Block]) -> dict[int, set[int]]:
    """Return the blocks of every natural loop by its first block."""
    before = _before(blocks)
    loops: dict[int, set[int]] = {}
    for n, dominators in _dominators(before).items():
        for header in set(blocks[n].next) & dominators:
            body = loops.setdefault(header, {header})
            waiting = [n]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting += before[inside]
    return loops


def _before(blocks: list[_Block]) -> dict[int, set[int]]:
    """Return, for each block that the first one reaches, those that may come just before it."""
    before: dict[int, set[int]] = {0: set()}
    waiting = [0]
    while waiting:
        n = waiting.pop()
        for follower in blocks[n].next:
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
