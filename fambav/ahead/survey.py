"""Compile every form of every Triton kernel, without a GPU, and measure the machine code."""

from __future__ import annotations

import datetime
import functools
import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fambav.ahead.report import AheadError, Report, Row
from fambav.ahead.sass import size

if TYPE_CHECKING:
    from fambav.ops.triton_kernels.variant import Variant

KERNELS = "fambav.ops.triton_kernels"
COMMAND = "fambav bench aot --json FILE"
ALIGNED = [["tt.divisibility", 16]]
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def survey(archs: Sequence[int], *, only: str = "", package: str = KERNELS) -> Report:
    """Compile the forms that the modules of a package yield through `variants()`.

    Triton's own cache is used, whose key is all that a launch depends on too.

    Args:
        archs: Compute capabilities without their dots, such as 80 and 90.
        only: Text that the name of a form must hold.
        package: Whose modules are asked.

    Returns:
        A report with a row for each form and capability.

    Raises:
        AheadError: If Triton is missing or interprets kernels, or a kernel does not compile.
    """
    try:
        import triton
    except ModuleNotFoundError as error:
        hint = "pip install 'fambav[triton]'"
        raise AheadError(f"triton is not installed, expected it; {hint}") from error
    if triton.knobs.runtime.interpret:
        value = os.environ.get("TRITON_INTERPRET")
        raise AheadError(f"TRITON_INTERPRET is {value!r}, expected it unset: nothing is compiled")
    known = _variants(package)
    names = [name for name in known if only in name]
    if not names:
        raise AheadError(f"--only is {only!r}, expected a part of one of {len(known)} names")
    jobs = [(package, name, arch) for name in names for arch in archs]
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = tuple(pool.map(_row, *zip(*jobs, strict=True)))
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    return Report(date=str(today), triton=triton.__version__, command=COMMAND, rows=rows)


@functools.cache
def _variants(package: str) -> dict[str, Variant]:
    """Return every form by its name."""
    found: dict[str, Variant] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        loaded = importlib.import_module(f"{package}.{module.name}")
        for variant in getattr(loaded, "variants", tuple)():
            if variant.name in found:
                raise AheadError(f"kernel's name is {variant.name!r} twice, expected it once")
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
        raise AheadError(f"resources of {name} are missing, expected them from cuobjdump")
    registers, spill_bytes = map(int, usage.groups())
    instructions, loops = size(code)
    return Row(
        name=name,
        arch=arch,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        loops=loops,
        slots=_slots(variant, loops),
        instructions=instructions,
    )


def _compile(variant: Variant, arch: int) -> Any:
    """Return one form as Triton compiles it.

    Raises:
        AheadError: If it does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    from fambav.ops.triton_kernels.launch import OPTIONS

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
        raise AheadError(": ".join([told, *reason])) from error


def _slots(variant: Variant, loops: Sequence[int]) -> float | None:
    if not loops or len(loops) != len(variant.loop_work):  # as after unrolling
        return None
    each = zip(loops, variant.loop_work, strict=True)
    return round(sum(32 * variant.warps * length / work for length, work in each), 2)


def _tool(name: str, *arguments: Any) -> str:
    """Run one of the programs that come with Triton; return what it prints."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AheadError(f"{name} fails: {done.stderr.strip()}")
    return done.stdout
