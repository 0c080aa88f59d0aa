"""How deeply a pickle nests its values, read without building any of them.

Hashing a tuple recurses in C: a dictionary whose key is nested 200,000 deep ends the process.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any, NamedTuple

DEEPEST = 100  # weights, optimizers and images need less than 10


class DeepPickleError(ValueError):
    """A pickle is nested more deeply than data is."""


class _Effect(NamedTuple):
    """What an opcode takes from the stack and leaves there."""

    fixed: int  # values it takes, beside those behind a mark
    marked: bool  # whether it takes all behind the last mark
    leaves: int
    extends: bool  # whether it puts the others into the first


_EXTENDING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_STORE, _FETCH = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")


def _effect(opcode: pickletools.OpcodeInfo) -> _Effect:
    before, marked = opcode.stack_before, pickletools.markobject in opcode.stack_before
    fixed = before.index(pickletools.markobject) if marked else len(before)
    return _Effect(fixed, marked, len(opcode.stack_after), opcode.name in _EXTENDING)


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}
_LEAVES = {
    name
    for name, effect in _EFFECTS.items()
    if (effect.fixed, effect.marked, effect.leaves) == (0, False, 1)
} - {*_FETCH, "MARK"}


def check_depth(file: IO[bytes]) -> None:
    """Read one pickle to its end and refuse it if it nests too deeply.

    Args:
        file: Stands at the start of the pickle, and behind it afterwards.

    Raises:
        DeepPickleError: If values are nested more than `DEEPEST` deep.
        ValueError, LookupError: If it is no pickle.
    """
    stack: list[int] = []  # how deeply each value is nested
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in _LEAVES:
            stack.append(0)
        elif name in _STORE:
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _FETCH:
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            _apply(_EFFECTS[name], stack, marks)


def _apply(effect: _Effect, stack: list[int], marks: list[int]) -> None:
    fixed, marked, leaves, extends = effect
    start = (marks.pop() if marked else len(stack)) - fixed
    if start < 0:
        raise IndexError("an opcode takes values that are not there")
    taken = stack[start:]
    del stack[start:]
    if not leaves:
        return
    depth = 1 + max(taken[extends:], default=0)
    depth = max(depth, taken[0]) if extends else depth
    if depth > DEEPEST:
        raise DeepPickleError(f"nested more than {DEEPEST} deep")
    stack.append(depth)
