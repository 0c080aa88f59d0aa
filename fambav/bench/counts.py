"""How many operations a model does for an image, and how many bytes a run reads and writes.

Neither depends on how long anything takes, so both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fambav import costs
from fambav.bench.candidates import Candidate, images
from fambav.bench.work import Shape, mixing, mixing_backward
from fambav.engine.timing import Run

META = torch.device("meta")
UNREAD = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")  # of their first argument
UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
ALIASES = ("detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh")


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
    nothing; inside the fused mixer every kernel does, as `work.mixing` counts.  Every other
    operation of its own, such as a scan alone, is counted from outside.
    """
    counted = _Traffic()
    with counted:
        run()
    return counted.bytes


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        fused = _FUSED.get(func._schema.name)
        if fused is not None:
            self.bytes += round(fused(args, kwargs))
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


def _shape(xz: Tensor, parameters: tuple[Any, ...]) -> Shape:
    """Read the sizes of a block off the arguments of the fused mixer."""
    conv, _, _, dt_proj, _, A, _ = parameters[:7]
    (batch, length, width), out_proj = xz.shape, parameters[14]
    inner, rank = dt_proj.shape
    dim = inner if out_proj is None else len(out_proj)
    size = xz.element_size()
    return Shape(batch, length, dim, width // 2, A.shape[1], rank, conv.shape[1], size)


def _forward(args: tuple[Any, ...], options: dict[str, Any]) -> float:
    xz, *rest = args
    return mixing(_shape(xz, tuple(rest)), kept=options["keep"]) + _sizes(tuple(rest))


def _backward(args: tuple[Any, ...], options: dict[str, Any]) -> float:
    del options
    _, _, _, _, xz, *rest = args
    return mixing_backward(_shape(xz, tuple(rest))) + 2 * _sizes(tuple(rest))


_FUSED: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], float]] = {
    "fambav::bimamba_scan": _forward,
    "fambav::bimamba_scan_backward": _backward,
}
