"""Timings of every Triton kernel of a block, the scans also with other block sizes.

    python benchmarks/kernels.py --length 197 65 --dtype bfloat16

Without a GPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1 and small sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from fambav.bench.operations import LENGTHS, REVERSE, SCALE, Inputs
from fambav.bench.report import Report, Row, dtype_name, positive, settings
from fambav.bench.timing import Run, Times, captured, interleave, ratio, spread
from fambav.cli import guarded
from fambav.commands.bench import add_flags, measure
from fambav.commands.parser import Parser
from fambav.ops.kernels import kernel_set

BLOCKS = (32, 64, 128)
WARPS = (1, 2, 4)
DTYPES = (torch.bfloat16, torch.float32)
SHIPPED = "as shipped"
EPS = 1e-5
TAPS = 4  # of the convolution
KERNELS = tuple(
    f"{name}_{way}" for name in ("scan", "conv", "gate", "norm") for way in ("forward", "backward")
)


def main(words: list[str]) -> None:
    """Time the Triton kernels of a block, and find the fastest block sizes of the scans."""
    parser = Parser("benchmarks/kernels.py", description=main.__doc__, allow_abbrev=False)
    add_flags(parser, "batch rounds warmup dim state device lengths dtypes")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, dest="names")
    for name, default in (("--blocks", BLOCKS), ("--warps", WARPS)):
        parser.add_argument(name, type=int, nargs="+", metavar="N", default=default)
    measure(kernels, vars(parser.parse_args(words)))


def kernels(
    *,
    batch: int = 128,
    lengths: Sequence[int] = LENGTHS,
    dim: int = 384,
    state: int = 16,
    names: Sequence[str] = KERNELS,
    blocks: Sequence[int] = BLOCKS,
    warps: Sequence[int] = WARPS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device,
) -> Report:
    """Time every configuration of the kernels, the shipped one included, each once in every round.

    Args:
        batch: Sequences.
        lengths: Tokens of each.
        dim: Channels of each direction; a token has half as many outside the mixer.
        state: State size of each channel.
        names: Kernels.
        blocks: Channels of a program to try for the scans.
        warps: Warps of a program to try for them.
        dtypes: Of the tokens.
        rounds: Timings of each configuration, at least 1.
        warmup: Rounds before those.
        device: To run on; without a GPU the kernels are interpreted.

    Returns:
        A row for every kernel, dtype and length with the fastest configuration and the shipped one.

    Raises:
        ValueError: If a number is too small.
        BackendError: If the kernels cannot be imported.
    """
    positive(batch=batch, length=min(lengths, default=0), dim=dim, state=state)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for dtype, length in product(dtypes, lengths):
        x = Inputs.draw(batch, length, dim, state, device=device, dtype=dtype)
        calls = Calls(x, dim=dim // 2)
        for name in names:
            ready, refused = ready_forms(getattr(calls, name), name, blocks, warps, device)
            where = {"kernel": name, "dtype": dtype_name(dtype), "length": length}
            skipped |= {f"{name} {where['dtype']} {length} {n}": r for n, r in refused.items()}
            times = interleave(ready, rounds=rounds, warmup=warmup, device=device)
            rows.append({**where, **best_form(times)})
    return Report(
        title="kernels and their configurations",
        settings=settings(device, batch=batch, dim=dim, state=state, rounds=rounds),
        rows=rows,
        skipped=skipped,
    )


def ready_forms(
    call: Callable[..., Any],
    name: str,
    blocks: Sequence[int],
    warps: Sequence[int],
    device: torch.device,
) -> tuple[dict[str, Run], dict[str, str]]:
    """Run every configuration of a kernel once; on a GPU, capture it as a CUDA graph.

    Returns:
        A run of each, the shipped one first, and why others cannot run.
    """
    from triton.errors import TritonError

    forms: dict[str, dict[str, int]] = {SHIPPED: {}}
    for block, warp in product(blocks, warps) if name.startswith("scan") else ():
        forms[f"block {block} warps {warp}"] = dict(block=block, warps=warp)
    ready: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for form, options in forms.items():
        run = partial(call, **options)
        try:
            run()
            ready[form] = captured(run) if device.type == "cuda" else run
        except (RuntimeError, ValueError, TritonError) as error:
            refused[form] = (str(error) or type(error).__name__).splitlines()[0]
    return ready, refused


def best_form(times: Mapping[str, Times]) -> Row:
    """Compare the fastest configuration with the shipped one."""
    medians: dict[str, float] = {n: spread(own)["median_ms"] for n, own in times.items()}
    best = min(medians, key=lambda form: medians[form])
    return {
        "best": best,
        "best_ms": medians[best],
        "shipped_ms": medians.get(SHIPPED),
        "times_faster": ratio(times.get(SHIPPED), times[best]),
        "all_ms": {form: round(value, 5) for form, value in medians.items()},
    }


class Calls:
    """The kernels of a block, called like in a mixer, each with its own inputs and outputs.

    Args:
        x: Inputs of the scans.
        dim: Width of a token outside the mixer.
        kernels: "triton" or "numba".
    """

    def __init__(self, x: Inputs, *, dim: int, kernels: str = "triton") -> None:
        self._set: Any = kernel_set(kernels).load()
        self._x, device = x, x.u.device
        self._y, self._dy = torch.empty_like(x.u), torch.empty_like(x.z)
        self._total, self._out, self._dz = (torch.empty_like(x.z) for _ in range(3))
        self._du, self._ddelta = torch.empty_like(x.u), torch.empty_like(x.delta)
        self._dprojected = torch.empty_like(x.projected)
        batch, length, inner = x.z.shape
        taps = [torch.randn(inner, TAPS, device=device) for _ in range(2)]
        self._conv = taps, [torch.randn(inner, device=device) for _ in range(2)]
        rows = batch * length, dim
        self._hidden, self._normed = (torch.randn(rows, device=device).to(x.z) for _ in range(2))
        self._residual, self._sum = (torch.randn(rows, device=device) for _ in range(2))
        self._weight = torch.ones(dim, device=device)
        self.scan_forward()
        self.gate_forward()
        self.norm_forward()

    def scan_forward(self, **form: int) -> object:
        """Scan in both directions and keep states; `form` may set block and warps of a program."""
        options: dict[str, Any] = dict(softplus=True, reverse=REVERSE, keep=True)
        last, self._kept = self._set.scan_forward(
            *self._x.scan_arguments(), self._y, **options, **form
        )
        return last

    def scan_backward(self, **form: int) -> object:
        """Compute all gradients of both scans."""
        x = self._x
        outputs = self._du, self._ddelta, *x.weights(self._dprojected)
        arguments = x.grad.expand_as(x.u), None, self._kept, *x.scan_arguments(), *outputs
        return self._set.scan_backward(*arguments, softplus=True, reverse=REVERSE, **form)

    def conv_forward(self) -> object:
        """Convolve in both directions."""
        run = self._set.conv_forward
        return run(self._x.z, *self._conv, self._y, silu=True, reverse=REVERSE)

    def conv_backward(self) -> object:
        """Compute the gradients of both convolutions."""
        run, x = self._set.conv_backward, self._x
        return run(x.u, x.z, *self._conv, self._out, silu=True, reverse=REVERSE)

    def gate_forward(self) -> object:
        """Add both directions and gate them."""
        x = self._x
        return self._set.gate_forward(x.u, x.z, self._out, self._total, scale=SCALE)

    def gate_backward(self) -> object:
        """Compute the gradients of the gate."""
        x = self._x
        outputs = self._dy, self._dz
        return self._set.gate_backward(x.grad, self._total, x.z, *outputs, scale=SCALE)

    def norm_forward(self) -> object:
        """Add to the residual stream and normalise."""
        arguments = self._hidden, self._residual, self._weight, self._normed, self._sum
        self._scale = self._set.add_rms_norm_forward(*arguments, eps=EPS)
        return self._scale

    def norm_backward(self) -> object:
        """Compute the gradients of the norm."""
        arguments = self._hidden, self._residual, self._sum, self._weight, self._scale
        outputs = torch.empty_like(self._hidden), torch.empty_like(self._residual)
        return self._set.add_rms_norm_backward(*arguments, *outputs)


if __name__ == "__main__":
    raise SystemExit(guarded(main, sys.argv[1:]))
