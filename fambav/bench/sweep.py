"""Which block of channels and how many warps suit the scan kernels on a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from fambav.bench.calls import Calls
from fambav.bench.report import Report, Row, settings, short
from fambav.bench.scan import LENGTHS, positive
from fambav.bench.work import Shape
from fambav.engine.timing import Run, Times, captured, interleave, ratio, spread
from fambav.ops.kernels import kernel_set

BLOCKS = (32, 64, 128)
WARPS = (1, 2, 4)
DTYPES = (torch.bfloat16, torch.float32)
KERNELS = ("scan_forward", "scan_backward")
DEFAULT = "as shipped"


def sweep(
    *,
    batch: int = 128,
    lengths: Sequence[int] = LENGTHS,
    dim: int = 384,
    state: int = 16,
    blocks: Sequence[int] = BLOCKS,
    warps: Sequence[int] = WARPS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device,
) -> Report:
    """Time every form of the scan kernels, the shipped one among them, all in every round.

    Args:
        batch: Sequences.
        lengths: Tokens of each.
        dim: Channels of each direction.
        state: Numbers of state for each channel.
        blocks: Channels of a program to try.
        warps: Warps of a program to try.
        dtypes: Of the tokens.
        rounds: How often each form is timed, at least 1.
        warmup: Rounds before those.
        device: Where; without a GPU the kernels are interpreted.

    Returns:
        A row for every kernel, dtype and length with the fastest form beside the shipped one.

    Raises:
        ValueError: If a number is too small.
        BackendError: If the kernels cannot be imported.
    """
    positive(batch=batch, length=min(lengths, default=0), dim=dim, state=state)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for dtype, length in product(dtypes, lengths):
        shape = Shape(batch, length, dim // 2, dim, state, dim // 32, 4, dtype.itemsize)
        calls = Calls(shape, "triton", device=device, dtype=dtype)
        calls.scan_forward()
        for kernel in KERNELS:
            ready, refused = _ready(calls, kernel, blocks, warps, device)
            where = {"kernel": kernel, "dtype": short(dtype), "length": length}
            skipped |= {f"{' '.join(map(str, where.values()))} {n}": r for n, r in refused.items()}
            times = interleave(ready, rounds=rounds, warmup=warmup, device=device)
            rows.append({**where, **_best(times)})
    told: dict[str, Any] = dict(batch=batch, dim=dim, state=state, rounds=rounds)
    return Report(
        title="block sizes of the scan kernels",
        settings=settings(device, **told),
        rows=tuple(rows),
        skipped=skipped,
    )


def _ready(
    calls: Calls,
    kernel: str,
    blocks: Sequence[int],
    warps: Sequence[int],
    device: torch.device,
) -> tuple[dict[str, Run], dict[str, str]]:
    """Try every form of a kernel once, and record it on a GPU.

    Returns:
        What runs each, and why the others cannot run.
    """
    from triton.errors import TritonError

    found: dict[str, Run] = {}
    refused: dict[str, str] = {}
    forms = _forms(getattr(kernel_set("triton").load(), kernel), blocks, warps)
    if len(forms) == 1:
        refused["other forms"] = "its block and warps cannot be chosen"
    for name, options in forms.items():
        run = partial(getattr(calls, kernel), **options)
        try:
            run()
            found[name] = captured(run) if device.type == "cuda" else run
        except (RuntimeError, ValueError, TritonError) as error:
            refused[name] = (str(error) or type(error).__name__).splitlines()[0]
    return found, refused


def _forms(
    kernel: Callable[..., Any], blocks: Sequence[int], warps: Sequence[int]
) -> dict[str, dict[str, int]]:
    """Return arguments of each form by its name; the shipped one alone if there is no choice."""
    found: dict[str, dict[str, int]] = {DEFAULT: {}}
    if {"block", "warps"} <= inspect.signature(kernel).parameters.keys():
        for block, warp in product(blocks, warps):
            found[f"block {block} warps {warp}"] = dict(block=block, warps=warp)
    return found


def _best(times: Mapping[str, Times]) -> Row:
    medians = {form: spread(found)["median_ms"] for form, found in times.items()}
    best = min(medians, key=lambda form: float(medians[form]))
    return {
        "best": best,
        "best_ms": medians[best],
        "shipped_ms": medians.get(DEFAULT),
        "times_faster": ratio(times.get(DEFAULT), times[best]),
        "all_ms": {form: round(value, 5) for form, value in medians.items()},
    }
