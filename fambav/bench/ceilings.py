"""What a device does at best here and now, and shares of it: a large product and a large copy.

Both take their turns in the same rounds as what is set beside them, so that a machine that is slow
in a round is slow for both.  Products are made as torch is set to: in float32 a GPU may use TF32.
What they are shares of, operations and bytes, is counted and so exact.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fambav import costs
from fambav.bench.candidates import Candidate, images
from fambav.bench.report import Row, dtype_name
from fambav.bench.timing import Run, Times, ratio, spread
from fambav.engine.memory import MIB

SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices multiplied
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes
STATE_EVERY = 64  # tokens from one state that is kept for the backward pass to the next
META = torch.device("meta")
COPY = ("ceiling", "copy")
UNREAD = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")  # of their first argument
UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
ALIASES = ("detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh")


class Ceilings:
    """Large products and a large copy, to be timed beside others.

    Args:
        device: Where.
        dtypes: Of the products; without any there are no ceilings.
    """

    def __init__(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
        side, copied = SIDE[device.type], COPIED[device.type]
        self._operations, self._bytes = 2 * side**3, 2 * copied
        self._runs: dict[tuple[str, str], Run] = {}
        for dtype in dtypes:
            left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            self._runs[_product(dtype)] = partial(torch.matmul, left, right)
        if dtypes:
            source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
            self._runs[COPY] = partial(torch.empty_like(source).copy_, source)

    def runs(self) -> dict[tuple[str, str], Run]:
        """Return what is to be timed, by keys of its own."""
        return self._runs

    def tables(self, times: Mapping[Any, Times]) -> dict[str, list[Row]]:
        """Return a table with a row for each ceiling; no table if there are none.

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
        return {"ceilings": rows} if rows else {}

    def bytes_per_s(self, times: Mapping[Any, Times]) -> float:
        """Return what the copy reads and writes in a second."""
        return self._per_s(times, COPY)

    def flops_per_s(self, times: Mapping[Any, Times], dtype: torch.dtype) -> float:
        """Return what the product does in a second, a multiply-add being two operations."""
        return self._per_s(times, _product(dtype))

    def beside(
        self,
        times: Mapping[Any, Times],
        own: Hashable,
        dtype: torch.dtype,
        *,
        batch: int,
        flops: float,
        run: Run,
    ) -> dict[str, Any]:
        """Return operations in a second and, if there are ceilings, shares of them.

        Args:
            times: Of `runs` and of a candidate.
            own: Key of the candidate.
            dtype: Of the product that it is set beside.
            batch: Images of one run.
            flops: Operations for one image.
            run: Does what the candidate does, and may be watched while it does.

        Returns:
            gflop_per_image, gflop_per_s, and with ceilings the bytes of a run as `traffic` counts
            them, gbyte_per_s, and flops_share and bytes_share of the ceilings, taken within each
            round.
        """
        second = statistics.median(times[own]) / 1000
        row = {"gflop_per_image": flops / 1e9, "gflop_per_s": batch * flops / second / 1e9}
        if not self._runs:
            return row
        moved = traffic(run)
        product, copy = (ratio(times[k], times[own]) or 0 for k in (_product(dtype), COPY))
        return {
            **row,
            "mib_moved": moved / MIB,
            "gbyte_per_s": moved / second / 1e9,
            "flops_share": batch * flops / self._operations * product,
            "bytes_share": moved / self._bytes * copy,
        }

    def _per_s(self, times: Mapping[Any, Times], key: tuple[str, str]) -> float:
        amount = self._bytes if key == COPY else self._operations
        return 1000 * amount / statistics.median(times[key])


def _product(dtype: torch.dtype) -> tuple[str, str]:
    return "ceiling", f"product in {dtype_name(dtype)}"


def flops(candidate: Candidate) -> float:
    """Return the operations of a forward pass over one image, a multiply-add being two.

    Ours are counted as `fambav flops` does, with twice the products and the terms of the scans of
    all directions; models of timm by torch's counter, which knows products and convolutions.
    """
    net = candidate.network(META).eval()
    if candidate.ours:
        whole = costs.count(net).total
        return float(whole.multiply_adds + whole.all_directions)
    # It imports triton, and complains if it cannot: only for those who need it.
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        net(images(net, 1, META))
    return float(counter.get_total_flops())


def traffic(run: Run) -> int:
    """Return the bytes that a run reads and writes at least, weights included.

    Every operation reads each of its tensors once and writes each result once, and views cost
    nothing; inside the fused mixer every kernel does, as `mixer_bytes` counts.  Every other
    operation of its own, such as a scan alone, is counted from outside.
    """
    counted = _Traffic()
    with counted:
        run()
    return counted.bytes


class _Traffic(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if func._schema.name == "fambav::bimamba_scan":
            xz, *weights = args
            self.bytes += _inside(xz, weights, "forward", keep=kwargs["keep"])
            self.bytes += _sizes(weights)
        elif func._schema.name == "fambav::bimamba_scan_backward":
            _, _, _, _, xz, *weights = args
            self.bytes += _inside(xz, weights, "backward", keep=True) + 2 * _sizes(weights)
        elif not func.is_view and name not in ALIASES:
            read = args[1:] if name in UNREAD else args
            written = () if name in UNWRITTEN else (*_written(func, args), found)
            self.bytes += _sizes((*read, kwargs)) + _sizes(written)
        return found


def _written(func: Any, args: tuple[Any, ...]) -> Iterable[Any]:
    """Return the arguments that an operation without results writes to."""
    if func._schema.returns:  # what it changes is what it returns
        return ()
    given = zip(func._schema.arguments, args, strict=False)
    return [value for about, value in given if about.alias_info and about.alias_info.is_write]


def _sizes(values: object) -> int:
    """Add up the tensors in nested values."""
    if isinstance(values, Tensor):
        repeated = any(stride == 0 for stride in values.stride()) and values.numel()
        return min(values.nbytes, values.untyped_storage().nbytes()) if repeated else values.nbytes
    if isinstance(values, dict):
        return _sizes(tuple(values.values()))
    if isinstance(values, tuple | list):
        return sum(map(_sizes, values))
    return 0


def _inside(xz: Tensor, weights: Sequence[Any], way: str, *, keep: bool) -> int:
    """Read the sizes of a block off the arguments of the fused mixer."""
    dt_proj, A, out_proj = weights[3], weights[5], weights[14]
    (batch, length, width), (inner, rank) = xz.shape, dt_proj.shape
    sizes = dict(batch=batch, length=length, inner=width // 2, state=A.shape[1], rank=rank)
    sizes |= dict(dim=inner if out_proj is None else len(out_proj), itemsize=xz.element_size())
    return mixer_bytes(**sizes, keep=keep)[way]


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
) -> dict[str, int]:
    """Count the bytes of a bidirectional mixer between in_proj and its result, without weights.

    Each kernel and each product reads and writes each of its tensors once.

    Args:
        batch: Sequences.
        length: Tokens of each.
        dim: Width of a token outside the mixer.
        inner: Width inside.
        state: Numbers of state for each channel.
        rank: Width of dt.
        itemsize: Bytes of a stored number.
        keep: Whether states and the sum of both scans are written for a backward pass.

    Returns:
        The bytes "forward" and "backward".
    """
    number = batch * length * itemsize  # one for every token
    channels, BC, dt = number * inner, 2 * number * 2 * state, 2 * number * rank
    states = 2 * batch * -(-length // STATE_EVERY) * inner * state * 4  # float32
    # scan, conv, gate; then x_proj, dt_proj and out_proj
    forward = (6 + 3 + 5) * channels + BC + (2 + 2 + 1) * channels + (dt + BC) + dt + number * dim
    # scan, conv twice, gate; two gradients of each product, and dt_proj once more
    backward = (9 + 4 + 3 + 5) * channels + 2 * BC + states
    backward += (4 + 6 + 2) * channels + 2 * (dt + BC) + 3 * dt + 2 * number * dim
    return {"forward": forward + (states if keep else -channels), "backward": backward}
