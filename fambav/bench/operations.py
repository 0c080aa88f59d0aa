"""A bidirectional selective scan, and a residual block: forward and backward by every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.bench.candidates import relative, use_backend
from fambav.bench.report import Report, positive, settings, training_dtype
from fambav.bench.timing import Run, interleave, peak_mib, spread, with_replays
from fambav.ecosystem import timm
from fambav.engine.memory import MIB
from fambav.engine.precision import Precision
from fambav.layers import Block, Tokens
from fambav.models import Vim
from fambav.ops import BackendError, selective_scan
from fambav.ops.kernels import interpreted, kernel_set

LENGTHS = (197, 130, 65, 29)
BATCH = {"cuda": 128, "cpu": 8}
BASELINES = ("cuda", "cpu", "reference")
BACKENDS = {  # what is compared where nothing else is asked for
    "cuda": ("triton", "cuda", "reference"),
    "cpu": ("numba", "cpu", "cuda", "reference"),
}
KERNEL_SETS = ("triton", "numba")
REVERSE = (False, True)
SCALE = 0.5

# What makes forward and backward pass by a backend at a length: the pass, and its peak memory.
Make = Callable[[str, int], tuple[Run, Callable[[], float]]]


def scan(
    *,
    batch: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    dim: int = 384,
    state: int = 16,
    device: torch.device,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> Report:
    """Measure a scan with all its options in both directions, their sum and its gate.

    The defaults are the scan of Vim-Ti.  Fused kernels are called as the mixer calls them, both
    directions at once; the other backends get the layout that they like best.

    Args:
        lengths: Tokens of each sequence.
        dim: Channels of each direction.
        state: Numbers of state for each channel.
        how: `names` of backends, by default those that suit the device; `rounds` and `warmup`.

    Returns:
        A row for every backend, way to launch it, and length.

    Raises:
        ValueError: If a number is too small.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch, dim=dim, state=state, length=min(lengths, default=0))
    drawn = {n: Inputs.draw(batch, n, dim, state, device=device, dtype=dtype) for n in lengths}

    def make(backend: str, length: int) -> tuple[Run, Callable[[], float]]:
        x = drawn[length]
        if backend in KERNEL_SETS:
            run: Run = partial(x.backward, backend)
            if device.type == "cpu":  # where autograd does not see what the kernels keep
                return run, lambda: sum(t.nbytes for t in x.forward(backend)[1:]) / MIB
            return run, partial(peak_mib, run, device)
        leaves = x.leaves(by_channel=backend == "cuda")
        grad = x.grad.mT.contiguous() if backend == "cuda" else x.grad.mT
        run = _gradients(backend, partial(composed, leaves), leaves, grad)
        return run, partial(peak_mib, run, device, ignored=leaves)

    about = dict(batch=batch, dim=dim, state=state)
    return _measured("bidirectional scan", make, lengths, device, dtype, about, **how)


def block(
    *,
    model: str = "vim_tiny",
    batch: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    device: torch.device,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> Report:
    """Measure a new block of a model, given what a block before it hands over.

    Args:
        model: Whose block.
        lengths: Tokens of each sequence.
        how: As `scan`.

    Returns:
        A row for every backend, way to launch it, and length.

    Raises:
        ValueError: If a number is too small.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch, length=min(lengths, default=0))
    torch.manual_seed(0)
    net = cast(Vim, timm.create_model(model, depth=1, num_classes=0))
    layer = cast(Block, net.layers[0]).to(device)
    precision = Precision(device, None if dtype == torch.float32 else dtype)

    def make(backend: str, length: int) -> tuple[Run, Callable[[], float]]:
        shape = batch, length, net.dim
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        residual = torch.randn(shape, device=device).requires_grad_()
        tokens = Tokens.start(x, class_places=())._replace(residual=residual)
        grads = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device)

        def forward() -> tuple[Tensor, Tensor]:
            with precision.autocast():
                found = layer(tokens)
            return found.x, found.residual

        leaves = [x, residual, *layer.parameters()]
        run = _gradients(backend, forward, leaves, grads)
        return run, partial(peak_mib, run, device, ignored=leaves)

    about = dict(model=model, batch=batch)
    return _measured("block (norm and mixer)", make, lengths, device, dtype, about, **how)


def _gradients(backend: str, forward: Run, leaves: Sequence[Tensor], grads: Any) -> Run:
    """Return what makes all gradients of a forward pass by a backend."""

    def run() -> object:
        with use_backend(backend):
            return torch.autograd.grad(cast(Any, forward()), leaves, grads)

    return run


def _measured(
    title: str,
    make: Make,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    about: dict[str, Any],
    *,
    names: Sequence[str] | None = None,
    rounds: int = 9,
    warmup: int = 2,
) -> Report:
    """Time every backend that can run here at every length; never an interpreter unasked."""
    passes: dict[tuple[Any, ...], tuple[Run, Callable[[], float]]] = {}
    skipped = dict[str, str]()
    for name in BACKENDS[device.type] if names is None else names:
        if names is None and name == "triton" and interpreted():
            skipped[name] = "TRITON_INTERPRET is set"
            continue
        try:
            made = {(name, length): make(name, length) for length in lengths}
            made[name, min(lengths)][0]()
        except BackendError as error:
            skipped[name] = str(error)
            continue
        passes |= made
    runs, refused = with_replays({key: run for key, (run, _) in passes.items()}, device)
    times = interleave(runs, rounds=rounds, warmup=warmup, device=device)
    peaks = {(name, "eager", length): peak() for (name, length), (_, peak) in passes.items()}
    longest = max(lengths)
    return Report(
        title=f"{title}, forward and backward",
        settings=settings(device, dtype, **about, rounds=rounds),
        rows=[
            {
                **dict(backend=name, launch=launch, length=length),
                **spread(own),
                **relative(
                    own,
                    {other: times.get((other, launch, length)) for other in BASELINES},
                    (times.get((name, launch, longest)), longest),
                    length,
                    peaks.get((name, launch, length)),
                ),
            }
            for (name, launch, length), own in times.items()
        ],
        skipped=skipped | refused,
    )


class Inputs(NamedTuple):
    """What both directions of a mixer hand to their scans.

    Attributes:
        u, delta: (2, batch, length, dim).
        z, grad: Gate and gradient of the result, (batch, length, dim).
        projected: Rows of B, C and what else a mixer projects, (2, batch, length, row).
        A: (dim, state) for each direction; D and bias: (dim,).
    """

    u: Tensor
    delta: Tensor
    z: Tensor
    grad: Tensor
    projected: Tensor
    A: list[Tensor]
    D: list[Tensor]
    bias: list[Tensor]

    @classmethod
    def draw(
        cls,
        batch: int,
        length: int,
        dim: int,
        state: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Inputs:
        """Draw everything, in the layout of a model."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        wide = torch.promote_types(dtype, torch.float32)
        row = -(-(2 * state + dim // 32 + 1) // 16) * 16
        A = -torch.arange(1.0, state + 1).repeat(dim, 1).to(device, wide)
        return cls(
            u=normal(2, batch, length, dim),
            delta=normal(2, batch, length, dim),
            z=normal(batch, length, dim),
            grad=normal(batch, length, dim),
            projected=normal(2, batch, length, row),
            A=[A, A.clone()],
            D=[normal(dim, dtype=wide) for _ in range(2)],
            bias=[normal(dim, dtype=wide) for _ in range(2)],
        )

    def weights(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """View B and C in rows of a projection, (2, batch, length, 1, state)."""
        state, rows = self.A[0].shape[1], projected.unsqueeze(3)
        return rows[..., :state], rows[..., state : 2 * state]

    def scanned(self) -> tuple[Any, ...]:
        """Return what the scan kernels of a set take."""
        return self.u, self.delta, self.A, *self.weights(self.projected), self.D, self.bias

    def forward(self, kernels: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gated result, and what is kept: the states, and the sum of both scans.

        Raises:
            BackendError: If this set of kernels cannot run here.
        """
        offered = kernel_set(kernels)
        reason = offered.missing() or offered.refuses(self.u)
        if reason is not None:
            raise BackendError(reason)
        run = offered.load()
        y, out, total = (torch.empty_like(t) for t in (self.u, self.z, self.z))
        _, kept = run.scan_forward(*self.scanned(), y, softplus=True, reverse=REVERSE, keep=True)
        run.gate_forward(y, self.z, out, total, scale=SCALE)
        return out, kept, total

    def backward(self, kernels: str) -> tuple[Any, ...]:
        """Return all gradients: of z, u, delta, the projected rows, and of A, D and bias."""
        _, kept, total = self.forward(kernels)
        run = kernel_set(kernels).load()
        dy, dz = torch.empty_like(self.z), torch.empty_like(self.z)
        run.gate_backward(self.grad, total, self.z, dy, dz, scale=SCALE)
        du, ddelta, rows = (torch.empty_like(t) for t in (self.u, self.delta, self.projected))
        places = du, ddelta, *self.weights(rows)
        given = dy.expand_as(self.u), None, kept, *self.scanned(), *places
        return dz, du, ddelta, rows, run.scan_backward(*given, softplus=True, reverse=REVERSE)

    def leaves(self, *, by_channel: bool) -> list[Tensor]:
        """Return the gate, and for each direction what `selective_scan` takes, as leaves.

        Args:
            by_channel: Lay tokens next to each other, as mamba-ssm's kernels want it.
        """

        def leaf(t: Tensor) -> Tensor:
            t = t.mT if t.dim() == 3 else t
            return (t.contiguous() if by_channel else t).detach().requires_grad_()

        B, C = (w.squeeze(3) for w in self.weights(self.projected))
        found = [leaf(self.z)]
        for k in range(2):
            given = self.u[k], self.delta[k], self.A[k].clone(), B[k], C[k], self.D[k], self.bias[k]
            found += map(leaf, given)
        return found


def composed(leaves: Sequence[Tensor]) -> Tensor:
    """Scan `Inputs.leaves` both ways, add and gate, (batch, dim, length)."""
    z, *given = leaves
    y = []
    for k, reverse in enumerate(REVERSE):
        u, delta, A, B, C, D, bias = given[7 * k : 7 * k + 7]
        options: dict[str, Any] = dict(delta_bias=bias, delta_softplus=True, reverse=reverse)
        y.append(selective_scan(u, delta, A, B, C, D, **options))
    gated: Tensor = (y[0] + y[1]) * (SCALE * F.silu(z))
    return gated
