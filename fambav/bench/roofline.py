"""Roofline model: peak compute and memory bandwidth of a device, and shares of them.

Peaks are measured by a large matrix product and a large copy, which take turns with the candidates,
so that a slow round is slow for both.  Products use the matmul precision that torch is set to: in
float32 a GPU may use TF32.  Operations and bytes are counted, and so exact.

Source: Williams et al., "Roofline", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fambav.bench.candidates import Candidate, images
from fambav.bench.report import Row, dtype_name
from fambav.bench.timing import Run, Times, ratio, spread
from fambav.engine.memory import MIB
from fambav.flops import count
from fambav.ops.kernels import kernel_set

SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes
META = torch.device("meta")
COPY = ("roofline", "copy")
NOT_READ = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")  # first argument
NOT_WRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
ALIASES = ("detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh")


class Roofline:
    """Peak compute and bandwidth of a device, timed beside candidates.

    Args:
        device: To be measured.
        dtypes: Of the products; without any, nothing is measured.
    """

    def __init__(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
        side, copied = SIDE[device.type], COPIED[device.type]
        self._flops, self._bytes = 2 * side**3, 2 * copied
        self._runs: dict[tuple[str, str], Run] = {}
        for dtype in dtypes:
            left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            self._runs[_product(dtype)] = partial(torch.matmul, left, right)
        if dtypes:
            source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
            self._runs[COPY] = partial(torch.empty_like(source).copy_, source)

    def runs(self) -> dict[tuple[str, str], Run]:
        """Return the runs to be timed, by keys of their own."""
        return self._runs

    def tables(self, times: Mapping[Any, Times]) -> dict[str, list[Row]]:
        """Return a table with a row for each peak; none if nothing was measured.

        Args:
            times: Of `runs`, in milliseconds.
        """
        rows: list[Row] = [
            {
                "what": key[1],
                **spread(times[key]),
                "giga_per_s": self._per_s(times, key) / 1e9,
                "of": "bytes read or written" if key == COPY else "operations",
            }
            for key in self._runs
        ]
        return {"roofline": rows} if rows else {}

    def bytes_per_s(self, times: Mapping[Any, Times]) -> float:
        """Return the memory bandwidth, reads and writes counted."""
        return self._per_s(times, COPY)

    def flops_per_s(self, times: Mapping[Any, Times], dtype: torch.dtype) -> float:
        """Return the peak compute, with two operations for a multiply-add."""
        return self._per_s(times, _product(dtype))

    def row(
        self,
        times: Mapping[Any, Times],
        key: Hashable,
        dtype: torch.dtype,
        *,
        batch: int,
        flops: float,
        run: Run,
    ) -> dict[str, Any]:
        """Return the throughput of a candidate and, if peaks were measured, its shares of them.

        Args:
            times: Of `runs` and of the candidate.
            key: Of the candidate.
            dtype: Of the product to compare with.
            batch: Images per run.
            flops: Operations per image.
            run: The candidate, run once more to count its bytes.

        Returns:
            gflop_per_image, gflop_per_s; with peaks also mib_moved per run, as `traffic` counts,
            gbyte_per_s, and flops_share and bytes_share of the peaks, taken within each round.
        """
        seconds = statistics.median(times[key]) / 1000
        row = {"gflop_per_image": flops / 1e9, "gflop_per_s": batch * flops / seconds / 1e9}
        if not self._runs:
            return row
        moved = traffic(run)
        product, copy = (ratio(times[k], times[key]) or 0 for k in (_product(dtype), COPY))
        return {
            **row,
            "mib_moved": moved / MIB,
            "gbyte_per_s": moved / seconds / 1e9,
            "flops_share": batch * flops / self._flops * product,
            "bytes_share": moved / self._bytes * copy,
        }

    def _per_s(self, times: Mapping[Any, Times], key: tuple[str, str]) -> float:
        amount = self._bytes if key == COPY else self._flops
        return 1000 * amount / statistics.median(times[key])


def _product(dtype: torch.dtype) -> tuple[str, str]:
    return "roofline", f"product in {dtype_name(dtype)}"


def flops(candidate: Candidate) -> float:
    """Return the operations of a forward pass over one image, two for a multiply-add.

    Our models are counted like `fambav flops`, with the scans of all directions; models of timm by
    torch's FlopCounterMode, which knows products and convolutions.
    """
    net = candidate.network(META).eval()
    if candidate.ours:
        whole = count(net).total
        return float(whole.multiply_adds + whole.all_directions)
    # Imported here, since it imports Triton and warns if it cannot.
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        net(images(net, 1, META))
    return float(counter.get_total_flops())


def traffic(run: Run) -> int:
    """Return a lower bound of the bytes that a run reads and writes, weights included.

    Every operation reads each of its tensors once and writes each result once; views are free.
    Inside the fused mixer every kernel does, as `mixer_bytes` counts; other operators of ours, such
    as a scan alone, are counted by their arguments and results.
    """
    counter = _Traffic()
    with counter:
        run()
    return counter.bytes


class _Traffic(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if func._schema.name == "fambav::bimamba_scan":
            xz, *weights = args
            self.bytes += _fused_bytes(xz, weights, kwargs)["forward"] + _nbytes(weights)
        elif func._schema.name == "fambav::bimamba_scan_backward":
            _, _, _, _, xz, *weights = args
            self.bytes += _fused_bytes(xz, weights, kwargs)["backward"] + 2 * _nbytes(weights)
        elif not func.is_view and name not in ALIASES:
            read = args[1:] if name in NOT_READ else args
            written = () if name in NOT_WRITTEN else (*_mutated(func, args), result)
            self.bytes += _nbytes((*read, kwargs)) + _nbytes(written)
        return result


def _mutated(func: Any, args: tuple[Any, ...]) -> Iterable[Any]:
    """Return the arguments that an operation without results writes to."""
    if func._schema.returns:  # it returns what it mutates
        return ()
    pairs = zip(func._schema.arguments, args, strict=False)
    return [value for spec, value in pairs if spec.alias_info and spec.alias_info.is_write]


def _nbytes(values: object) -> int:
    """Sum the bytes of the tensors in nested values; an expanded one counts as stored."""
    if isinstance(values, Tensor):
        expanded = any(stride == 0 for stride in values.stride()) and values.numel()
        return min(values.nbytes, values.untyped_storage().nbytes()) if expanded else values.nbytes
    if isinstance(values, dict):
        return _nbytes(tuple(values.values()))
    if isinstance(values, tuple | list):
        return sum(map(_nbytes, values))
    return 0


def _fused_bytes(xz: Tensor, weights: Sequence[Any], options: Mapping[str, Any]) -> dict[str, int]:
    dt_proj, A, out_proj = weights[3], weights[5], weights[14]
    (batch, length, width), (inner, rank) = xz.shape, dt_proj.shape
    sizes = dict(batch=batch, length=length, inner=width // 2, state=A.shape[1], rank=rank)
    sizes |= dict(dim=inner if out_proj is None else len(out_proj), itemsize=xz.element_size())
    return mixer_bytes(**sizes, keep=options.get("keep", True), kernels=options["kernels"])


def mixer_bytes(
    *,
    batch: int,
    length: int,
    dim: int,
    inner: int,
    state: int,
    rank: int,
    itemsize: int,
    keep: bool,
    kernels: str = "triton",
) -> dict[str, int]:
    """Count the bytes of a bidirectional mixer between in_proj and its result, without weights.

    Each kernel and each product reads and writes each of its tensors once.

    Args:
        batch: Sequences.
        length: Tokens of each.
        dim: Width of a token outside the mixer.
        inner: Width inside.
        state: State size of each channel.
        rank: Width of dt.
        itemsize: Bytes of an element.
        keep: Whether states and the sum of both scans are written for a backward pass.
        kernels: "triton" or "numba", which keep states at different intervals.

    Returns:
        The bytes "forward" and "backward".
    """
    column = batch * length * itemsize  # one element of every token
    channels, BC, dt = column * inner, 2 * column * 2 * state, 2 * column * rank
    states = min(itemsize, 4) if kernels == "triton" else 4  # bytes of an element
    states *= math.prod(kernel_set(kernels).kept_shape(2, batch, length, inner, state))
    # scan, conv, gate; then x_proj, dt_proj and out_proj
    forward = (6 + 3 + 5) * channels + BC + (2 + 2 + 1) * channels + (dt + BC) + dt + column * dim
    # scan, conv twice, gate; two gradients of each product, and dt_proj once more
    backward = (9 + 4 + 3 + 5) * channels + 2 * BC + states
    backward += (4 + 6 + 2) * channels + 2 * (dt + BC) + 3 * dt + 2 * column * dim
    return {"forward": forward + (states if keep else -channels), "backward": backward}
