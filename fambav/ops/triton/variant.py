"""What the ahead-of-time compiler is told about one compiled form of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One compiled form of a kernel, as launched on a GPU.

    Attributes:
        name: Kernel and what tells this form from the others, such as "scan_forward bf16 N16 BD64".
        kernel: The function under `triton.jit`.
        types: Type of every argument that is no constant, in Triton's words: "*bf16", "*fp32",
            "i32", "i64", "fp32".
        constants: Value of every `tl.constexpr` argument.
        warps: Warps of a program.
        aligned: Arguments (pointers and integers) known to be multiples of 16.
        ones: Integer arguments known to be 1, which Triton compiles as constants.
        loop_work: State-steps (one state number of one channel at one token) done by one pass of
            each innermost loop, in the order of the code; empty if not counted.
        registers: How many a thread may have, or None for as many as there are.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    aligned: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    loop_work: tuple[int, ...] = ()
    registers: int | None = None
