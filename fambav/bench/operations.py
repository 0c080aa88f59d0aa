"""Forward and backward of a bidirectional selective scan, and of a block, by every backend."""

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
from fambav.engine.memory import MIB
from fambav.engine.precision import Precision
from fambav.layers import Block, Tokens
from fambav.models import Vim
from fambav.ops import BackendError, selective_scan
from fambav.ops.kernels import interpreted, kernel_set
from fambav.timm_compat import timm

LENGTHS = (197, 130, 65, 29)
BATCH = {"cuda": 128, "cpu": 8}
BASELINES = ("cuda", "cpu", "reference")
BACKENDS = {  # compared by default
    "cuda": ("triton", "cuda", "reference"),
    "cpu": ("numba", "cpu", "cuda", "reference"),
}
KERNEL_SETS = ("triton", "numba")
REVERSE = (False, True)
SCALE = 0.5

# From a backend and a length to a forward and backward pass, and a measurement of its peak memory.
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

    The defaults are the scan of Vim-Ti.  Fused kernels are called as in the mixer, both directions
    at once; the other backends get the memory layout that is fastest for them.

    Args:
        lengths: Tokens of each sequence.
        dim: Channels of each direction.
        state: State size of each channel.
        how: `names` of backends, by default those for the device; `rounds` and `warmup`.

    Returns:
        A row for every backend, launch (eager or replayed) and length.

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
            if device.type == "cpu":  # the tensors kept are not visible to autograd
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
    """Measure a new block of a model on random tokens and residual stream.

    Args:
        model: Whose block.
        lengths: Tokens of each sequence.
        how: As in `scan`.

    Returns:
        A row for every backend, launch (eager or replayed) and length.

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
        tokens = Tokens.start(x, cls_index=())._replace(residual=residual)
        grads = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device)

        def forward() -> tuple[Tensor, Tensor]:
            with precision.autocast():
                out = layer(tokens)
            return out.x, out.residual

        leaves = [x, residual, *layer.parameters()]
        run = _gradients(backend, forward, leaves, grads)
        return run, partial(peak_mib, run, device, ignored=leaves)

    about = dict(model=model, batch=batch)
    return _measured("block (norm and mixer)", make, lengths, device, dtype, about, **how)


def _gradients(backend: str, forward: Run, leaves: Sequence[Tensor], grads: Any) -> Run:
    """Return a run of a forward pass by a backend and all its gradients."""

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
    """Time every backend that can run here; Triton's interpreter only if it is named."""
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
    """Random inputs of both scans of a mixer.

    Attributes:
        u, delta: (2, batch, length, dim).
        z, grad: Gate and gradient of the result, (batch, length, dim).
        projected: B, C and the rest of the projection, (2, batch, length, row).
        A: (dim, state) of each direction.
        D, bias: (dim,) of each direction.
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
        """Draw all inputs, in the memory layout of a model."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        upcast = torch.promote_types(dtype, torch.float32)
        row = -(-(2 * state + dim // 32 + 1) // 16) * 16
        A = -torch.arange(1.0, state + 1).repeat(dim, 1).to(device, upcast)
        return cls(
            u=normal(2, batch, length, dim),
            delta=normal(2, batch, length, dim),
            z=normal(batch, length, dim),
            grad=normal(batch, length, dim),
            projected=normal(2, batch, length, row),
            A=[A, A.clone()],
            D=[normal(dim, dtype=upcast) for _ in range(2)],
            bias=[normal(dim, dtype=upcast) for _ in range(2)],
        )

    def weights(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """View B and C of a projection, (2, batch, length, 1, state)."""
        state, rows = self.A[0].shape[1], projected.unsqueeze(3)
        return rows[..., :state], rows[..., state : 2 * state]

    def scan_arguments(self) -> tuple[Any, ...]:
        """Return the inputs in the order of the scan kernels' arguments."""
        return self.u, self.delta, self.A, *self.weights(self.projected), self.D, self.bias

    def forward(self, kernels: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gated result, and for backward the states and the sum of both scans.

        Raises:
            BackendError: If these kernels cannot run here.
        """
        chosen = kernel_set(kernels)
        reason = chosen.unavailable() or chosen.unsupported(self.u)
        if reason is not None:
            raise BackendError(reason)
        run = chosen.load()
        y, out, total = (torch.empty_like(t) for t in (self.u, self.z, self.z))
        _, kept = run.scan_forward(
            *self.scan_arguments(), y, softplus=True, reverse=REVERSE, keep=True
        )
        run.gate_forward(y, self.z, out, total, scale=SCALE)
        return out, kept, total

    def backward(self, kernels: str) -> tuple[Any, ...]:
        """Return all gradients: of z, u, delta and the projection, and those of A, D and bias."""
        _, kept, total = self.forward(kernels)
        run = kernel_set(kernels).load()
        dy, dz = torch.empty_like(self.z), torch.empty_like(self.z)
        run.gate_backward(self.grad, total, self.z, dy, dz, scale=SCALE)
        du, ddelta, rows = (torch.empty_like(t) for t in (self.u, self.delta, self.projected))
        outputs = du, ddelta, *self.weights(rows)
        arguments = dy.expand_as(self.u), None, kept, *self.scan_arguments(), *outputs
        return dz, du, ddelta, rows, run.scan_backward(*arguments, softplus=True, reverse=REVERSE)

    def leaves(self, *, by_channel: bool) -> list[Tensor]:
        """Return the gate and the arguments of `selective_scan` for each direction, as leaves.

        Args:
            by_channel: Make tokens contiguous, as mamba-ssm's kernels require.
        """

        def leaf(t: Tensor) -> Tensor:
            t = t.mT if t.dim() == 3 else t
            return (t.contiguous() if by_channel else t).detach().requires_grad_()

        B, C = (w.squeeze(3) for w in self.weights(self.projected))
        leaves = [leaf(self.z)]
        for k in range(2):
            own = self.u[k], self.delta[k], self.A[k].clone(), B[k], C[k], self.D[k], self.bias[k]
            leaves += map(leaf, own)
        return leaves


def composed(leaves: Sequence[Tensor]) -> Tensor:
    """Scan `Inputs.leaves` in both directions, add and gate, (batch, dim, length)."""
    z, *rest = leaves
    y = []
    for k, reverse in enumerate(REVERSE):
        u, delta, A, B, C, D, bias = rest[7 * k : 7 * k + 7]
        options: dict[str, Any] = dict(delta_bias=bias, delta_softplus=True, reverse=reverse)
        y.append(selective_scan(u, delta, A, B, C, D, **options))
    gated: Tensor = (y[0] + y[1]) * (SCALE * F.silu(z))
    return gated
