"""Whole training steps, with the product's own code: by backend, and with token fusion."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fambav.bench.candidates import CLASSES, EAGER, REPLAYED, Candidate, candidates, images, sifted
from fambav.bench.ceilings import Ceilings
from fambav.bench.counts import flops
from fambav.bench.report import Report, Row, settings
from fambav.bench.scan import LENGTHS, positive, training_dtype
from fambav.bench.split import Watched, split
from fambav.bench.stack import stack
from fambav.build import updates
from fambav.config import Config
from fambav.engine.memory import MIB
from fambav.engine.runtime import Processes, numerics
from fambav.engine.timing import Run, Times, interleave, peak_mib, ratio, spread
from fambav.engine.train import Update

BATCH = {"cuda": 128, "cpu": 2}
NAMES = {"cuda": ("triton", "cuda"), "cpu": ("numba", "cpu", "cuda")}
BASELINES = ("cuda", "cpu")
EPOCH = 1000  # updates
PASSES = 3  # a backward pass makes two products for each one of the forward pass

Batch = tuple[torch.Tensor, torch.Tensor]


class Step(NamedTuple):
    """A model and what trains it, on images that stay the same.

    Attributes:
        net: The model.
        update: One step of its optimizer.
        batch: Images and labels, on the device.
        backend: What its operations run by; None for the fastest.
        recorded_mib: Peak of memory while its passes were recorded; None if they were not.
    """

    net: nn.Module
    update: Update
    batch: Batch
    backend: str | None
    recorded_mib: float | None

    def run(self) -> torch.Tensor:
        """Make a step; return its loss."""
        with stack(self.backend):
            return self.update(itertools.repeat(self.batch), 0)

    def peak_mib(self) -> float:
        """Return the peak memory of a step, in MiB, beyond weights and the optimizer's state."""
        if self.recorded_mib is not None:
            return self.recorded_mib
        return peak_mib(self.run, self.batch[0].device, ignored=self.net.parameters())


def step(
    *,
    batch: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = 5,
    warmup: int = 2,
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
    names: Sequence[str] | None = None,
    ceilings: bool = False,
    parts: bool = False,
    **which: Any,
) -> Report:
    """Measure whole training steps: forward, loss, backward and optimizer, on random images.

    Args:
        batch: Images; by default 128 on a GPU and 2 on a CPU.
        lengths: Tokens, class tokens included; images get a size that makes so many.
        rounds: How often each candidate is timed, at least 1.
        warmup: Rounds before those.
        device: Where.
        dtypes: Of the forward pass; by default that of training there.
        names: Backends; by default those that suit the device, and no plain PyTorch.
        ceilings: Also measure a copy and products, and set all beside them, as `Ceilings` does.
        parts: Also tell where the time goes, by layer and by operation, as `split` does.
        which: What else is compared, as `candidates` takes it; peers are not recorded.

    Returns:
        A row for every candidate.  Operations are three times those of a forward pass.

    Raises:
        ValueError: If a number is too small, or as `candidates`.
        MeasureError: If no candidate can run here.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtypes = [training_dtype(device)] if dtypes is None else dtypes
    positive(batch=batch, length=min(lengths, default=0))
    names = NAMES[device.type] if names is None else names
    given = candidates(names=names, dtypes=dtypes, lengths=lengths, device=device, **which)
    with numerics(deterministic=False, matmul_precision="high"):
        able, skipped = sifted([c for c in given if c.ours or c.launch == EAGER], device)
        steps, refused = _steps(able, batch, device)
        limits = Ceilings(device, dtypes if ceilings else ())
        runs: dict[Any, Run] = {key: ready.run for key, ready in steps.items()}
        options: dict[str, Any] = dict(rounds=rounds, warmup=warmup, device=device)
        times = interleave({**runs, **limits.runs()}, **options)
        rows = tuple(_row(key, steps, times, max(lengths), limits) for key in steps)
        tables = limits.tables(times)
        if parts:
            tables |= split(_watched(steps), rounds=rounds, device=device)
    title = "training step (forward, loss, backward, optimizer)"
    kept = "allocated" if device.type == "cuda" else "saved for backward"
    about = settings(device, model=given[0].model, batch=batch, rounds=rounds, memory=kept)
    return Report(title=title, settings=about, rows=rows, skipped=skipped | refused, tables=tables)


def _watched(steps: Mapping[Candidate, Step]) -> dict[str, Watched]:
    """Return what may be split: a replay tells nothing of its parts."""
    return {
        key.name: Watched(one.run, one.net, one.update.optimizer)
        for key, one in steps.items()
        if key.launch == EAGER
    }


def _row(
    key: Candidate,
    steps: Mapping[Candidate, Step],
    times: Mapping[Any, Times],
    longest: int,
    limits: Ceilings,
) -> Row:
    """Compare with other backends, and with the longest sequences of the same one.

    `over_NAME` says how many times faster than that backend in the same round; `growth` is time
    over that at the longest length, divided by the ratio of the lengths: 1 is proportional.
    """
    own, length, batch = times[key], key.length, len(steps[key].batch[0])
    growth = ratio(own, times.get(key._replace(length=longest))) if length else None
    named = dict(key.row())
    del named["plan"]
    return {
        **named,
        "length": length,
        "images_per_s": 1000 * batch / statistics.median(own),
        **spread(own),
        **{f"over_{b}": ratio(times.get(key._replace(backend=b)), own) for b in BASELINES},
        "peak_mib": steps[key].peak_mib(),
        "growth": None if growth is None or length is None else growth * longest / length,
        **limits.beside(
            times,
            key,
            key.dtype,
            batch=batch,
            flops=PASSES * flops(key),
            run=steps[key._replace(launch=EAGER)].run,
        ),
    }


def _steps(
    able: Iterable[Candidate], batch: int, device: torch.device
) -> tuple[dict[Candidate, Step], dict[str, str]]:
    """Make a step for each candidate, and say why it cannot be recorded."""
    found: dict[Candidate, Step] = {}
    refused: dict[str, str] = {}
    for candidate in able:
        try:
            found[candidate] = training(candidate, batch=batch, device=device)
        except RuntimeError as error:
            if candidate.launch == EAGER:
                raise
            refused[candidate.name] = str(error).splitlines()[0]
    return found, refused


def training(candidate: Candidate, *, batch: int, device: torch.device, seed: int = 0) -> Step:
    """Make a model and what trains it.

    Args:
        candidate: The model, and how it runs.
        batch: Images.
        device: Where.
        seed: Of weights, images and labels.

    Raises:
        ValueError: If the model cannot be built so.
    """
    config = _config(candidate, batch)
    net = candidate.network(device, drop_path=config.model.drop_path, seed=seed)
    given = images(net, batch, device)
    labels = torch.randint(CLASSES, (batch,)).to(device)
    group, peak = Processes(0, 1, device), None
    recorded = candidate.launch == REPLAYED
    if recorded:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    with stack(candidate.backend):
        update = updates.update(config, net, group, num_classes=CLASSES, per_epoch=EPOCH)
    if recorded:
        peak = (torch.cuda.max_memory_allocated(device) - before) / MIB
    update.forward.train()
    return Step(net, update, (given, labels), candidate.backend, peak)


def _config(candidate: Candidate, batch: int) -> Config:
    """Return the settings of a plain run: no mixing, no moving average."""
    mixed, recorded = candidate.dtype != torch.float32, candidate.launch == REPLAYED
    name = candidate.model if candidate.ours else f"timm/{candidate.model}"
    precision = {"amp_dtype": "fp16" if candidate.dtype == torch.float16 else "bf16"}
    return Config.from_flat(
        dict(model=name, data_set="FAKE", batch_size=batch, cuda_graphs=recorded)
        | dict(mixup=0.0, cutmix=0.0, model_ema=False, amp=mixed)
        | (precision if mixed else {})
    )
