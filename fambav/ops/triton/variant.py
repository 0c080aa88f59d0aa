"""Specializations of the kernels, for the ahead-of-time audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One specialization of a kernel, as launched on a GPU.

    Attributes:
        name: Kernel and specialization, such as "scan_forward bf16 N16 BD64".
        kernel: The function under `triton.jit`.
        types: Type of every argument that is not a constant, in Triton's notation: "*bf16",
            "*fp32", "i32", "i64", "fp32".
        constants: Value of every `tl.constexpr` argument.
        warps: Warps of a program.
        aligned: Arguments (pointers and integers) known to be multiples of 16.
        ones: Integer arguments known to be 1, which Triton compiles as constants.
        loop_work: State-steps (one element of the state of one channel at one token) per iteration
            of each innermost loop, in code order; empty if not counted.
        registers: Limit per thread (maxnreg); None for no limit.
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
