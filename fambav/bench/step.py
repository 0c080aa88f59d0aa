"""Whole training steps, with the product's own code: by backend, and with token fusion."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch

from fambav.bench.report import Report, settings
from fambav.bench.scan import LENGTHS, positive, table, training_dtype
from fambav.bench.stack import sift, stack
from fambav.build import updates
from fambav.config import Config
from fambav.ecosystem import timm
from fambav.engine.memory import MIB
from fambav.engine.runtime import Processes, numerics
from fambav.engine.timing import interleave, peak_mib
from fambav.engine.train import Update
from fambav.models import Vim

BATCH = {"cuda": 128, "cpu": 2}
NAMES = {"cuda": ("triton", "cuda"), "cpu": ("numba", "cpu", "cuda")}
CLASSES = 1000
EPOCH = 1000  # updates

Key = tuple[str, str, int]  # backend, launch, length


class Step(NamedTuple):
    """A model and what trains it, on images that stay the same.

    Attributes:
        net: The model.
        update: One step of its optimizer.
        batch: Images and labels, on the device.
        backend: What its operations run by; None for the fastest.
        recorded_mib: Peak of memory while its passes were recorded; None if they were not.
    """

    net: Vim
    update: Update
    batch: tuple[torch.Tensor, torch.Tensor]
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
    model: str = "vim_tiny",
    batch: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = 5,
    warmup: int = 2,
    device: torch.device,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    cuda_graphs: bool = False,
) -> Report:
    """Measure whole training steps: forward, loss, backward and optimizer, on random images.

    Args:
        model: One of ours.
        batch: Images; by default 128 on a GPU and 2 on a CPU.
        lengths: Tokens, class tokens included; images get a size that makes so many.
        rounds: How often each candidate is timed, at least 1.
        warmup: Rounds before those.
        device: Where.
        dtype: Of the forward pass; by default that of training there.
        names: Backends; by default those that suit the device, and no plain PyTorch.
        cuda_graphs: Measure each also with its passes recorded.

    Returns:
        A row for every backend, way to launch it, and length.

    Raises:
        ValueError: If a number is too small.
    """
    batch = BATCH[device.type] if batch is None else batch
    dtype = training_dtype(device) if dtype is None else dtype
    positive(batch=batch, length=min(lengths, default=0))
    wanted = NAMES[device.type] if names is None else names
    options: dict[str, Any] = dict(batch=batch, device=device, dtype=dtype)

    def attempt(name: str) -> object:
        probe = training(model, length=min(lengths), backend=name, **options | dict(batch=1))
        return probe.net.eval()(probe.batch[0])

    launches = ("eager", "replayed") if cuda_graphs else ("eager",)
    with numerics(deterministic=False, matmul_precision="high"):
        able, skipped = sift(wanted, device, attempt)
        steps, refused = _steps(model, itertools.product(able, launches, lengths), **options)
        runs = {key: ready.run for key, ready in steps.items()}
        times = interleave(runs, rounds=rounds, warmup=warmup, device=device)
        memory: dict[tuple[Any, ...], float] = {key: s.peak_mib() for key, s in steps.items()}
    return Report(
        title="training step (forward, loss, backward, optimizer)",
        settings=settings(device, dtype, model=model, batch=batch, rounds=rounds),
        rows=table(times, memory, lengths, baselines=("cuda", "cpu")),
        skipped=skipped | refused,
    )


def _steps(
    model: str, wanted: Iterable[Key], **options: Any
) -> tuple[dict[Key, Step], dict[str, str]]:
    """Make a step for each backend, launch and length, and say why it cannot be recorded."""
    found: dict[Key, Step] = {}
    refused: dict[str, str] = {}
    for name, launch, length in wanted:
        given: dict[str, Any] = dict(length=length, backend=name)
        try:
            found[name, launch, length] = training(
                model, cuda_graphs=launch == "replayed", **given, **options
            )
        except RuntimeError as error:
            if launch == "eager":
                raise
            refused[f"{name} {launch} {length}"] = str(error).splitlines()[0]
    return found, refused


def training(
    model: str,
    *,
    length: int | None = None,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    cuda_graphs: bool = False,
    fusion: dict[str, Any] | None = None,
    seed: int = 0,
) -> Step:
    """Make a model and what trains it.

    Args:
        model: One of ours.
        length: Tokens at the start; None for the model's own.
        batch: Images.
        device: Where.
        dtype: Of the forward pass.
        backend: What operations run by; None for the fastest.
        cuda_graphs: Record the passes.
        fusion: Arguments `fusion_...` of the model.
        seed: Of weights, images and labels.

    Raises:
        ValueError: If the model cannot be built so.
    """
    config = _config(model, batch, dtype, cuda_graphs=cuda_graphs)
    torch.manual_seed(seed)
    options: dict[str, Any] = dict(num_classes=CLASSES, drop_path_rate=config.model.drop_path)
    if length is not None:
        options["img_size"] = image_size(model, length)
    net = cast(Vim, timm.create_model(model, **options, **fusion or {})).to(device)
    images = torch.randn(batch, net.patch_embed.in_chans, *net.img_size).to(device)
    labels = torch.randint(CLASSES, (batch,)).to(device)
    group, peak = Processes(0, 1, device), None
    if cuda_graphs:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    with stack(backend):
        update = updates.update(config, net, group, num_classes=CLASSES, per_epoch=EPOCH)
    if cuda_graphs:
        peak = (torch.cuda.max_memory_allocated(device) - before) / MIB
    update.forward.train()
    return Step(net, update, (images, labels), backend, peak)


def image_size(model: str, length: int) -> tuple[int, int]:
    """Return height and width, in pixels, of images that become so many tokens.

    The grid of patches is as square as their number allows.
    """
    with torch.device("meta"):
        net = cast(Vim, timm.create_model(model))
    patches = length - len(net.class_places)
    if patches < 1:
        raise ValueError(f"length is {length}, expected at least {1 + len(net.class_places)}")
    rows = next(n for n in range(int(patches**0.5), 0, -1) if patches % n == 0)
    (patch, _), (stride, _) = net.patch_embed.proj.kernel_size, net.patch_embed.proj.stride
    return patch + stride * (rows - 1), patch + stride * (patches // rows - 1)


def _config(model: str, batch: int, dtype: torch.dtype, *, cuda_graphs: bool) -> Config:
    """Return the settings of a plain run: no mixing, no moving average."""
    mixed = dtype != torch.float32
    precision = {"amp_dtype": "fp16" if dtype == torch.float16 else "bf16"}
    return Config.from_flat(
        dict(model=model, data_set="FAKE", batch_size=batch, cuda_graphs=cuda_graphs)
        | dict(mixup=0.0, cutmix=0.0, model_ema=False, amp=mixed)
        | (precision if mixed else {})
    )
