"""One residual block of a model, norm and mixer, forward and backward by every backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fambav.bench.report import Report, settings
from fambav.bench.scan import BATCH, LENGTHS, Pass, positive, table, training_dtype
from fambav.bench.stack import sift, stack
from fambav.ecosystem import timm
from fambav.engine.runtime import Precision
from fambav.engine.timing import interleave, with_replays
from fambav.layers import Block, Tokens
from fambav.models import Vim


def block(
    *,
    model: str = "vim_tiny",
    batch: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = 9,
    warmup: int = 2,
    device: torch.device,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
) -> Report:
    """Measure a block of a model on its own.

    Args:
        model: Whose block.
        batch: Sequences; by default 128 on a GPU and 8 on a CPU.
        lengths: Tokens of each sequence.
        rounds: How often each candidate is timed, at least 1.
        warmup: Rounds before those.
        device: Where.
        dtype: Of the tokens; weights and the residual stream stay float32.
        names: Backends; by default those that suit the device.

    Returns:
        A row for every backend, way to launch it, and length.

    Raises:
        ValueError: If a number is too small.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch, length=min(lengths, default=0))
    net = one_block(model, device)
    passes: dict[tuple[Any, ...], Pass] = {}
    probe = _Pass(net, 1, min(lengths), dtype)
    able, skipped = sift(names, device, lambda _: probe.forward())
    for name in able:
        for length in lengths:
            ready = _Pass(net, batch, length, dtype)
            passes[name, length] = Pass(partial(ready.both, name), ignored=ready.ignored)
    runs, refused = with_replays({key: found.run for key, found in passes.items()}, device)
    times = interleave(runs, rounds=rounds, warmup=warmup, device=device)
    memory = {(name, "eager", n): found.peak_mib(device) for (name, n), found in passes.items()}
    return Report(
        title="block (norm and mixer), forward and backward",
        settings=settings(device, dtype, model=model, batch=batch, rounds=rounds),
        rows=table(times, memory, lengths),
        skipped=skipped | refused,
    )


def one_block(model: str, device: torch.device) -> Block:
    """Return a new block of the width of a model."""
    torch.manual_seed(0)
    net = cast(Vim, timm.create_model(model, depth=1, num_classes=0))
    return cast(Block, net.layers[0]).to(device)


class _Pass:
    """A block and what goes in: the output of the block before, and the residual stream."""

    def __init__(self, net: nn.Module, batch: int, length: int, dtype: torch.dtype) -> None:
        self._net = net
        weights = list(net.parameters())
        shape, device = (batch, length, len(cast(Any, net).norm.weight)), weights[0].device
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        residual = torch.randn(shape, device=device).requires_grad_()
        self._tokens = Tokens.start(x, class_places=())._replace(residual=residual)
        self._grads = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device)
        self._precision = Precision(device, None if dtype == torch.float32 else dtype)
        self.ignored = [x, residual, *weights]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the mixer's output and the new residual stream."""
        with self._precision.autocast():
            tokens = self._net(self._tokens)
        return tokens.x, tokens.residual

    def both(self, backend: str) -> object:
        """Return all gradients."""
        with stack(backend):
            return torch.autograd.grad(self.forward(), self.ignored, self._grads)
